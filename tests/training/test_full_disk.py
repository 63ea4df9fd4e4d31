"""A run on a file system that is actually full: a one-line error, the previous checkpoint intact, nothing half written."""

import errno
import json
import subprocess

import pytest

from ov3fast import cli
from ov3fast.training import checkpoint


def train(*arguments) -> int:
    return cli.main(["train", "--device", "cpu", *map(str, arguments)])


def kilobytes(folder) -> int:
    return int(subprocess.run(["du", "-sk", folder], capture_output=True, text=True, check=True).stdout.split()[0])


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory) -> int:
    """Size in kilobytes of an undisturbed run, with its two checkpoints and its model."""
    run = tmp_path_factory.mktemp("whole") / "run"
    recipe = tiny.recipe(data, run, ((6, 32),), gradient_norms_every=None)
    (run.parent / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert train("--recipe", run.parent / "recipe.json") == 0
    return kilobytes(run)


@pytest.mark.parametrize(
    ("share", "kept", "at"),
    [(0.004, None, "tokenizer.json"), (0.2, None, "step-00000003"), (0.6, 3, "step-00000006"), (0.93, 6, "model")],
)
def test_the_checkpoint_before_stays_and_the_run_goes_on(tiny, data, tmp_path, small_disk, whole, capsys, share, kept, at):
    disk = small_disk(int(share * whole))
    recipe = tiny.recipe(data, disk / "run", ((6, 32),), gradient_norms_every=None)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert train("--recipe", tmp_path / "recipe.json") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the disk is full" in line and str(disk / "run") in line and at in line
    found = checkpoint.latest(disk / "run" / "checkpoints")
    assert (found and found.state["progress"]["step"]) == kept
    assert {path.name for path in disk.rglob(".*")} <= {".metadata"}
    small_disk(2 * whole)
    assert train("--recipe", tmp_path / "recipe.json", "--resume") == 0
    assert checkpoint.latest(disk / "run" / "checkpoints").state["progress"]["step"] == 6


def test_a_log_that_fills_the_disk_names_the_run(tiny, data, tmp_path, monkeypatch, capsys):
    def write(self, row):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ov3fast.training.logs.RunLog.write", write)
    (tmp_path / "recipe.json").write_text(json.dumps(tiny.recipe(data, tmp_path / "run", ((1, 32),)).to_dict()))
    assert train("--recipe", tmp_path / "recipe.json") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the disk is full" in line and str(tmp_path / "run") in line
