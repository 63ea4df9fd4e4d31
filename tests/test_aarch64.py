"""tools/aarch64.py, with stand-ins for Debian's programs."""

import os
import stat
import sys

import pytest

from tools import aarch64


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """An empty folder as PATH; programs(name) puts one there that writes down how it was called."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, status: int = 0) -> None:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $OV3FAST_NATIVE $*" >> {calls}\nexit {status}\n')
        (folder / name).chmod(stat.S_IRWXU)

    make.calls = calls
    return make


def test_what_is_missing_is_named(programs, tmp_path, monkeypatch):
    programs("debootstrap")
    programs("dpkg-deb")
    monkeypatch.setattr(sys, "argv", ["aarch64.py", "--folder", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="needs Debian's g\\+\\+-aarch64-linux-gnu, qemu-user-static$"):
        aarch64.main()


@pytest.mark.parametrize("status", [0, 1])
def test_a_finished_folder_is_reused_and_the_tests_decide(status, programs, tmp_path, monkeypatch):
    for name in aarch64.NEEDED:
        programs(name, status if "qemu" in name else 0)
    folder, built = tmp_path / "out", []
    folder.mkdir()
    (folder / "finished").touch()
    run = aarch64.subprocess.run

    def without_compiling(command, **options):
        if "csrc/build.py" in command:
            built.append((options["env"]["CXX"], command[2:]))
            return None
        return run(command, **options)

    monkeypatch.setattr(aarch64.subprocess, "run", without_compiling)
    monkeypatch.setattr(sys, "argv", ["aarch64.py", "--folder", str(folder), "-x"])
    assert aarch64.main() == status
    assert built == [("aarch64-linux-gnu-g++", [folder / "_native", "--only", "portable"])]
    [call] = programs.calls.read_text().splitlines()
    assert call.startswith(f"qemu-aarch64-static {folder}/_native -L {folder}/root {folder}/root/usr/bin/python3 -S -m pytest")
    assert call.endswith(" -x")


def test_packages_are_pinned():
    pins = {line.split("==")[0] for line in (aarch64.ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert set(aarch64.PACKAGES) <= pins
    assert all(os.path.exists(aarch64.ROOT / path) for path in aarch64.TESTS if path.startswith("tests/"))
