"""The CPU kernels on aarch64, emulated: python tools/aarch64.py [--folder build/aarch64] [PYTEST'S ARGUMENTS]

Cross-compiles them and runs the operators' tests of small sizes, forward and backward, in an aarch64 Python under qemu's user-mode emulation. That Python comes
from Debian and its packages from pip's index; they are kept in the folder. Needs Debian's g++-aarch64-linux-gnu, qemu-user-static and debootstrap, and
root for the last of them, the first time. `make test-aarch64` does this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "debootstrap": "debootstrap",
    "dpkg-deb": "dpkg",
}
RELEASE = "bookworm"
# The last release whose aarch64 wheel on pip's index works without CUDA's libraries.
TORCH = "torch==2.10.0"
# What torch and the test tools depend on: pip would evaluate the conditions of dependencies for this machine, not for aarch64.
PACKAGES = (
    "filelock", "fsspec", "hypothesis", "iniconfig", "Jinja2", "MarkupSafe", "mpmath", "networkx", "numpy", "packaging", "pluggy",
    "Pygments", "pytest", "sortedcontainers", "sympy", "typing_extensions",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
TESTS = ("tests/ops", "--implementations", "portable", "-m", "not backend_independent and not large")
"""All parity tests, and those of NaN, infinity, tile borders and threads. Left out: torch.compile, which needs a compiler there, and random shapes."""
KEYWORDS = "not compile and not any_shape"


def prepare(folder: Path) -> Path:
    """The emulated Python, with its packages in FOLDER/site. Reuses what an earlier run completed."""
    root, site, finished = folder / "root", folder / "site", folder / "finished"
    python = root / "usr" / "bin" / "python3"
    if not finished.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        packages = "--include=python3,libgomp1,libstdc++6"
        subprocess.run(
            ["debootstrap", "--download-only", "--arch=arm64", "--variant=minbase", packages, RELEASE, root],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        # Unpacked and not installed: that needs no emulated maintainer scripts.
        for archive in sorted((root / "var" / "cache" / "apt" / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", archive, root], check=True)
            archive.unlink()
        version = os.readlink(python).removeprefix("python")
        pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
        where = [option for platform in PLATFORMS for option in ("--platform", platform)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", version, *where,
             "--target", site, TORCH, *(f"{name}=={pins[name]}" for name in PACKAGES)],
            check=True,
        )  # fmt: skip
        finished.touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "aarch64")
    options, arguments = parser.parse_known_args()
    if missing := sorted(package for program, package in NEEDED.items() if shutil.which(program) is None):
        sys.exit(f"tools/aarch64.py needs Debian's {', '.join(missing)}")
    python = prepare(options.folder)
    native = options.folder / "_native"
    environment = {**os.environ, "CXX": "aarch64-linux-gnu-g++", "OV3FAST_CUDA": "0"}
    subprocess.run([sys.executable, "csrc/build.py", native, "--only", "portable"], cwd=ROOT, env=environment, check=True)
    environment = {
        **os.environ, "OV3FAST_NATIVE": str(native), "PYTHONPATH": str(options.folder / "site"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    # -S leaves out the packages of this machine's Debian, which a folder without site-packages of its own would let through.
    pytest = ["qemu-aarch64-static", "-L", python.parents[2], python, "-S", "-m", "pytest", "-p", "no:cacheprovider"]
    return subprocess.run([*pytest, *TESTS, "-k", KEYWORDS, *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
