"""An interrupted and resumed run is bitwise equal to an uninterrupted one."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ov3fast import ops
from ov3fast.training import checkpoint, train
from ov3fast.training.logs import read_rows
from ov3fast.training.optimizer import AdamW

CLOCK = ("seconds", "images_per_s", "data_wait", "memory_gib", "tflops")


def outcome(run_dir: Path) -> dict:
    """Everything that must agree: sha256 of the last checkpoint's tensors, the order of the samples, the logged values."""
    last = checkpoint.latest(run_dir / "checkpoints")
    rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in read_rows(run_dir / "log.jsonl")]
    progress = last.state["progress"]
    return {
        **{
            f"{group}/{name}": hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for group in ("model", "optimizer", "ema")
            for name, value in last.tensors[group].items()
        },
        **{name: progress[name] for name in ("step", "images", "order_hash", "cursors")},
        "rows": rows,
    }


@pytest.fixture(scope="session")
def whole(tiny, data, tmp_path_factory):
    """Outcome of an uninterrupted run, by `accumulate`."""
    known = {}

    def get(accumulate: int = 1) -> dict:
        if accumulate not in known:
            run_dir = tmp_path_factory.mktemp("whole") / "run"
            metrics = train(tiny.recipe(data, run_dir, accumulate=accumulate))
            assert not metrics["interrupted"] and metrics["step"] == 8
            known[accumulate] = outcome(run_dir)
        return known[accumulate]

    return get


@pytest.mark.parametrize(
    ("kill_at", "saved", "accumulate"),
    [(4, [3], 2), (7, [3, 4, 6], 1)],
    ids=["before the stage's end, accumulating", "in the second stage"],
)
def test_sigkill_then_resume_gives_the_same_bits(tiny, data, tmp_path, whole, kill_at, saved, accumulate):
    command = [sys.executable, tiny.__file__, data, tmp_path, "--kill-at", str(kill_at), f"accumulate={accumulate}"]
    killed = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.steps(tmp_path / "checkpoints") == saved
    train(tiny.recipe(data, tmp_path, accumulate=accumulate), resume=True)
    assert outcome(tmp_path) == whole(accumulate)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 5)])
def test_a_signal_saves_at_the_steps_end(tiny, data, tmp_path, whole, monkeypatch, number, at):
    zero_grad = AdamW.zero_grad

    def signalled(self):
        if self.steps == at - 1:
            os.kill(os.getpid(), number)
        return zero_grad(self)

    recipe = tiny.recipe(data, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "zero_grad", signalled)
        metrics = train(recipe)
    assert metrics["interrupted"] and metrics["step"] == at
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == at and not (tmp_path / "model").exists()
    metrics = train(recipe, resume=True)
    assert not metrics["interrupted"]
    rows = read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert outcome(tmp_path) == whole()


def interrupt(recipe, monkeypatch, at):
    update = ops.adamw_ema_

    def failing(*arguments, step, **options):
        if step == at:
            raise MemoryError
        return update(*arguments, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "adamw_ema_", failing)
        with pytest.raises(MemoryError):
            train(recipe)


def test_a_broken_newest_checkpoint_is_passed_over(tiny, data, tmp_path, whole, monkeypatch):
    recipe = tiny.recipe(data, tmp_path)
    interrupt(recipe, monkeypatch, 7)
    newest = tmp_path / "checkpoints" / "step-00000006" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(checkpoint.CheckpointWarning, match="step-00000006/__0_0.distcp has 1000 bytes"):
        train(recipe, resume=True)
    assert outcome(tmp_path) == whole()


def test_what_a_resume_refuses(tiny, data, tmp_path, monkeypatch):
    recipe = tiny.recipe(data, tmp_path)
    interrupt(recipe, monkeypatch, 4)
    with pytest.raises(ValueError, match=r"step-00000003 is of another recipe \(optimizer.weight_decay: 0.2 -> 0.1\)"):
        train(dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, weight_decay=0.1)), resume=True)
    with pytest.raises(
        FileExistsError, match="holds a run that got to step 3; resume it, overwrite it, or name another run_dir"
    ):
        train(recipe)


def test_a_finished_run_and_a_new_one_over_it(tiny, data, tmp_path, capsys):
    recipe = tiny.recipe(data, tmp_path, stages=((1, 32),))
    first = train(recipe, resume=True)
    assert f"no checkpoint in {tmp_path / 'checkpoints'}: starting from the beginning" in capsys.readouterr().out.replace(
        "\n", ""
    )
    assert train(recipe, resume=True) == first
    other = train(dataclasses.replace(recipe, seed=1), overwrite=True)
    assert other["loss"] != first["loss"] and other["order_hash"] == first["order_hash"]
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1]


def test_the_final_model_is_the_average(tiny, data, tmp_path):
    from ov3fast import OpenVision3

    train(tiny.recipe(data, tmp_path))
    saved = checkpoint.latest(tmp_path / "checkpoints")
    model = OpenVision3.from_pretrained(tmp_path / "model")
    for name, value in model.named_parameters():
        assert torch.equal(value, saved.tensors["ema"][name]), name
    assert len(model.caption(torch.zeros(1, 3, 32, 32))) == 1
