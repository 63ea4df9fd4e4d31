"""tools/versions.py, without creating an environment."""

import re

import pytest

from tools import versions


@pytest.mark.parametrize("status", [0, 1])
def test_all_is_run_whatever_fails(status, tmp_path):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$TRITON_INTERPRET $*" >> {calls}\nexit {status}\n')
    python.chmod(0o755)
    assert versions.try_out(python) is (status == 0)
    lines = calls.read_text().splitlines()
    assert len(lines) == 5 and lines[2].startswith("1 -m pytest") and lines[4].startswith(" -m ov3fast.kernels.aot")


def test_what_is_run_exists():
    assert all((versions.ROOT / path).is_file() for path in (*versions.NAMES, *versions.INTERPRETED, *versions.COMPILED))


def test_an_environment_is_made_anew_only_for_other_packages(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(versions.venv, "create", lambda home, **_: (made.append(home), home.mkdir(exist_ok=True)))
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: None)
    for _ in range(2):
        versions.prepare(tmp_path, "2.11.0", "3.6.0", "2.3.5")
    assert len(made) == 1
    monkeypatch.setattr(versions, "TOOLS", versions.TOOLS[:1])
    versions.prepare(tmp_path, "2.11.0", "3.6.0", "2.3.5")
    assert len(made) == 2


def test_the_oldest_torch_is_the_one_that_the_package_asks_for():
    [bound] = re.findall(r'"torch>=([\d.]+)"', (versions.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rows = [line.split()[2:] for line in (versions.ROOT / "Makefile").read_text().splitlines() if "tools/versions.py" in line]
    assert len(rows) == 2 and rows[0][0].startswith(bound + ".")
