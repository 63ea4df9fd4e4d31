"""fetch() against fake clients on the PATH; no network."""

import hashlib
import stat
import sys

import pytest

from ov3fast.data import assets
from ov3fast.data.assets import ASSETS, Asset, AssetError, MissingClient, fetch, sha256

CONTENT = b"a package\n"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake("npm", "printf ... > file") puts a client on an otherwise empty PATH and registers one asset of it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def make(client: str, script: str | None, digest: str = hashlib.sha256(CONTENT).hexdigest()):
        asset = Asset(client, "thing", "1.0", "thing-1.0.tgz", digest, "MIT", "a thing")
        monkeypatch.setitem(ASSETS, "thing", asset)
        program = programs / {"npm": "npm", "apt": "apt-get", "pip": "pip"}[client]
        if script is not None:
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        if client == "pip":
            monkeypatch.setattr(assets, "_pip", lambda: (str(program),))
        return tmp_path / "cache"

    return make


WRITE = "printf 'a package\\n' > thing-1.0.tgz"


@pytest.mark.parametrize("client", ["pip", "npm", "apt"])
def test_a_client_fetches_once(fake, client):
    cache = fake(client, f'{WRITE}; echo "$@" >> "$0.calls"')
    path = fetch("thing", cache)
    assert path == cache / "packages" / "thing-1.0.tgz" and path.read_bytes() == CONTENT
    assert fetch("thing", cache) == path
    [call] = next(path.parents[2].joinpath("bin").glob("*.calls")).read_text().splitlines()
    assert {"pip": "thing==1.0", "npm": "thing@1.0", "apt": "thing=1.0"}[client] in call
    assert [p.name for p in path.parent.iterdir()] == ["thing-1.0.tgz"]
    path.write_bytes(b"damaged")
    assert fetch("thing", cache).read_bytes() == CONTENT


@pytest.mark.parametrize("client, program", [("npm", "npm"), ("apt", "apt-get")])
def test_a_missing_client_is_named(fake, client, program):
    with pytest.raises(MissingClient, match=rf"^{client} thing 1\.0: the program {program} is not on this machine$"):
        fetch("thing", fake(client, None))


def test_a_missing_pip_is_named(fake, monkeypatch):
    cache = fake("pip", WRITE)
    monkeypatch.undo()
    monkeypatch.setitem(ASSETS, "thing", Asset("pip", "thing", "1.0", "thing-1.0.tgz", "", "MIT", "a thing"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assets._pip.cache_clear()
    try:
        with pytest.raises(MissingClient, match="pip: neither `/bin/false -m pip` nor a program pip"):
            fetch("thing", cache)
    finally:
        assets._pip.cache_clear()


def test_another_version_is_left_out_by_its_hash(fake):
    cache = fake("apt", "printf 'other' > thing_2.0.deb")
    with pytest.raises(AssetError, match=r"apt thing 1\.0: thing_2\.0\.deb has sha256 [0-9a-f]{64}, pinned is [0-9a-f]{64}"):
        fetch("thing", cache)
    assert not list((cache / "packages").iterdir())


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'W: a warning' >&2; echo \"E: Version '1.0' for 'thing' was not found\" >&2; exit 100",
         "apt ended with 100: E: Version '1.0' for 'thing' was not found"),
        ("exit 3", "apt ended with 3: no message"),
        ("true", r"expected one file, the client left \[\]"),
    ],
)  # fmt: skip
def test_a_failing_client_says_why(fake, script, reason):
    with pytest.raises(AssetError, match=reason) as error:
        fetch("thing", fake("apt", script))
    assert "\n" not in str(error.value)


def test_a_client_that_fills_the_disk_is_no_reason_to_go_on_without_it(fake):
    words = "echo 'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device' >&2; exit 1"
    with pytest.raises(OSError, match="the disk is full.*/cache/packages'$"):
        fetch("thing", fake("pip", words))


def test_a_client_that_hangs_is_stopped(fake, monkeypatch):
    monkeypatch.setattr(assets, "FETCH_TIMEOUT_S", 0.2)
    with pytest.raises(AssetError, match=r"npm took longer than 0\.2 s"):
        fetch("thing", fake("npm", "exec /bin/sleep 30"))


def test_an_unknown_asset_is_named():
    with pytest.raises(ValueError, match="no asset is called 'imagenet'; there are fluent, twitter"):
        fetch("imagenet")


def test_the_table_is_pinned():
    for asset in ASSETS.values():
        assert asset.client in assets.CLIENTS and len(asset.sha256) == 64 and asset.licence
        assert asset.version.split("+")[0].split("~")[0] in asset.file
    wheel = assets._command(ASSETS["skimage"])
    assert wheel[wheel.index("--python-version") + 1] == "3.11" and "scikit-image==0.26.0" in wheel
    assert "--platform" not in assets._command(ASSETS["emoji"])


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
