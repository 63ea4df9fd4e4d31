"""The Dockerfile passes the linter, and starts an existing command."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ov3fast import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_lint():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_starts_a_command_that_exists(capsys):
    [line] = re.findall(r"^ENTRYPOINT (.*)$", TEXT, re.M)
    program, command, *options = json.loads(line)
    assert program == cli.PROGRAM and command in cli.COMMANDS
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in options if option.startswith("--"))
    assert "EXPOSE 8000" in TEXT and "8000/ready" in TEXT


def test_what_it_copies_is_there():
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.M):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"ov3fast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md"} & set(ignored)
