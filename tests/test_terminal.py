"""The command line as a process: limited encodings, closed pipes, Ctrl-C, --quiet and -v, narrow terminals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ov3fast import cli, environment, terminal

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments: str, shell_tail: str = "", **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ov3fast", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **env}
    return subprocess.run(command, env=env, capture_output=True, timeout=120)


def in_process(code: str, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=120)


def with_command(body: str) -> str:
    """Code whose command `probe` runs `body`, and that exits as `ov3fast probe` would."""
    return f"""
import signal, sys, types, warnings
from ov3fast import cli
module = types.ModuleType("ov3fast.cli.probe")
def run(arguments):
{body}
    return 0
module.run = run
sys.modules["ov3fast.cli.probe"] = module
cli.COMMANDS["probe"] = cli.Command("probe", "for the test")
sys.exit(cli.main(["probe", *sys.argv[1:]]))
"""


def test_python_m_and_the_json_of_doctor():
    done = start("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and set(found) == {
        "machine",
        "environment",
        "choice",
        "packages",
        "tools",
        "files",
        "operators",
    }
    assert set(found["environment"]) == set(environment.WORDS) and found["operators"]["linear"]


def test_doctor_fits_80_columns_and_any_encoding():
    done = start("doctor", PYTHONIOENCODING="ascii", OV3FAST_CPU_ISA="nonsense", OV3FAST_CACHE="/tmp/Zoë")
    assert done.returncode == 0 and done.stderr == b""
    text = done.stdout.decode("ascii")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80 and "..." not in text
    assert "OV3FAST_CPU_ISA must be one of" in text and "/tmp/Zo\\xeb" in text
    assert re.search(r"^  linear +cpu +cpu, |^  linear +\w+ +\w+", text, re.MULTILINE)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_written_in_ascii(encoding):
    done = in_process(with_command('    print("caf\\u00e9 \\u2192 \\u65e5 \\udcff")'), PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    expected = {
        "ascii": b"caf\\xe9 -> \\u65e5 \\udcff",
        "latin-1": b"caf\xe9 -> \\u65e5 \\udcff",
        "utf-8": "café → 日 \\udcff".encode(),
    }
    assert done.stdout.strip() == expected[encoding]


@pytest.mark.parametrize("body", ['    print("line\\n" * 100000)', "    from ov3fast import doctor; doctor.show()"])
def test_a_pipe_that_closes_is_quiet(body):
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", with_command(body)], env=env, stdout=write, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_broken_pipe_is_an_error():
    done = in_process(with_command('    raise BrokenPipeError("a worker went away")'))
    assert done.returncode == 2 and done.stderr.splitlines() == [b"ov3fast: error: a worker went away"]


def test_ctrl_c_is_130_and_one_line():
    done = in_process(with_command("    signal.raise_signal(signal.SIGINT)"))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"ov3fast: interrupted\n")


def test_sigterm_unwinds(tmp_path):
    body = """
    import tempfile
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        signal.raise_signal(signal.SIGTERM)"""
    done = in_process(
        with_command(body).replace("cli.main(", f"sys.argv.append({str(tmp_path)!r}) or cli.main(").replace("*sys.argv[1:]", "")
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, b"") and list(tmp_path.iterdir()) == []


def test_quiet_and_verbose():
    body = '    print("words"); warnings.warn("careful"); raise ValueError("wrong")'
    plain, quiet, verbose = (
        in_process(with_command(body).replace("*sys.argv[1:]", flag)) for flag in ("", "'-q'", "'--verbose'")
    )
    assert plain.stdout == b"words\n" and plain.stderr == b"ov3fast: warning: careful\nov3fast: error: wrong\n"
    assert quiet.stdout == b"" and quiet.stderr == b"ov3fast: error: wrong\n" and quiet.returncode == 2
    assert b"Traceback" in verbose.stderr and b"ValueError: wrong" in verbose.stderr


@pytest.mark.parametrize("command", ["encode", "evaluate", "caption", "reconstruct", "bench", "tune", "doctor", "train"])
def test_options_stay_readable_at_40_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    try:
        code = cli.main([command, "--help"])
    except SystemExit as end:
        code = end.code
    text = capsys.readouterr().out
    assert code == 0 and "--quiet" in text
    lines = text.splitlines()
    flags = [line for line in lines if re.match(r"  (-\w, )?--[\w.-]+", line)]
    assert flags and all(len(line) <= 40 or " " not in line.strip() or line in flags for line in lines)
    if command == "encode":
        # A flag stands on its own line with its text below, in words that are not broken.
        place = next(i for i, line in enumerate(lines) if line.startswith("  --out"))
        assert lines[place + 1].startswith("    File to write: .safetensors")


def test_the_list_of_commands_fits_40_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < 40 and all(f"  {name}" in text for name in cli.COMMANDS)


def test_bench_and_tune_explain_themselves_without_a_checkout(tmp_path):
    """As installed: only a copy of the package."""
    import shutil

    shutil.copytree(ROOT / "ov3fast", tmp_path / "ov3fast", ignore=shutil.ignore_patterns("_native", "__pycache__"))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in ("bench", "tune"):
        done = subprocess.run([sys.executable, "-m", "ov3fast", command, "--help"], env=env, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0 and b"--only" in done.stdout, done.stderr
        done = subprocess.run([sys.executable, "-m", "ov3fast", command], env=env, cwd=tmp_path, capture_output=True)
        assert done.returncode == 2 and b"run this in a checkout of the repository" in done.stderr


def test_the_list_of_environment_words_is_whole():
    tracked = subprocess.run(["git", "grep", "-ohI", "OV3FAST_[A-Z0-9_]*"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert set(tracked.stdout.split()) - {"OV3FAST_"} == set(environment.WORDS)


def test_a_key_is_not_reported(monkeypatch):
    monkeypatch.delenv("OV3FAST_API_KEY", raising=False)
    assert environment.report()["OV3FAST_API_KEY"].startswith("not set")
    monkeypatch.setenv("OV3FAST_API_KEY", "hidden")
    assert environment.report()["OV3FAST_API_KEY"] == "set" and "hidden" not in str(environment.report())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["encode", "--help"], ["evaluate", "--help"]])
def test_help_costs_no_torch(arguments):
    code = f"""
import sys
from ov3fast import cli
try:
    cli.main({arguments})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "diffusers", "matplotlib", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = in_process(code)
    assert done.returncode == 0, done.stderr


def test_output_is_open_here():
    assert not terminal.output_is_closed()
