"""on_spike: how a run handles a loss that is non-finite or far above the previous ones."""

import json

import pytest
import torch

from ov3fast.training import SpikeError, checkpoint, train
from ov3fast.training.guard import LEAST, WINDOW, median_if_spike
from ov3fast.training.logs import read_rows
from ov3fast.training.optimizer import AdamW
from ov3fast.training.step import Step


def spoiling(monkeypatch, steps, value):
    """Multiplies every loss in the given steps (from 0, by the optimizer's count) by `value`, once."""
    call, zero_grad, seen, left = Step.__call__, AdamW.zero_grad, {}, list(steps)

    def counted(self):
        seen["step"] = self.steps
        return zero_grad(self)

    def spoiled(self, *arguments):
        losses, measured = call(self, *arguments)
        if seen["step"] in left:
            left.remove(seen["step"])
            losses = {name: loss * value for name, loss in losses.items()}
        return losses, measured

    monkeypatch.setattr(AdamW, "zero_grad", counted)
    monkeypatch.setattr(Step, "__call__", spoiled)


def recipe_of(tiny, data, run_dir, **changes):
    return tiny.recipe(data, run_dir, ((6, 32),), gradient_norms_every=None, checkpoint_steps=2, **changes)


def tensors(run_dir):
    return checkpoint.latest(run_dir / "checkpoints").tensors


def test_a_step_is_skipped(tiny, data, tmp_path, monkeypatch):
    spoiling(monkeypatch, [3], torch.nan)
    metrics = train(recipe_of(tiny, data, tmp_path, on_spike="skip"))
    assert metrics["step"] == 6
    [path] = tmp_path.glob("non-finite-step-00000003-rank-0.json")
    record = json.loads(path.read_text())
    assert len(record["samples"]) == 24 and "pixel" in record["terms"]
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1, 2, 3, 5, 6]
    state = checkpoint.latest(tmp_path / "checkpoints").state["progress"]
    assert state["skipped"] == 1 and state["step"] == 6


def test_a_skipped_step_leaves_all_as_it_was(tiny, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoiling(patch, [2], torch.inf)
        recipe = recipe_of(tiny, data, tmp_path / "skipped", on_spike="skip")
        train(recipe)
    before = checkpoint.load(tmp_path / "skipped" / "checkpoints" / "step-00000002").tensors
    # Steps 3 (skipped) and 4: the checkpoint of 4 has one update more than that of 2.
    after = checkpoint.load(tmp_path / "skipped" / "checkpoints" / "step-00000004")
    assert after.state["progress"]["skipped"] == 1
    assert not torch.equal(before["model"]["encoder.norm.weight"], after.tensors["model"]["encoder.norm.weight"])


def test_going_back_leaves_the_window_out(tiny, data, tmp_path, monkeypatch):
    spoiling(monkeypatch, [3], torch.nan)
    metrics = train(recipe_of(tiny, data, tmp_path, on_spike="rollback"))
    state = checkpoint.latest(tmp_path / "checkpoints").state["progress"]
    # From the checkpoint of step 2 with the batches 4 on (from 0): 2 and 3 are left out.
    assert metrics["step"] == 6 and state["skipped"] == 0
    assert state["ended"]["batches_left_out"] == 2
    rows = read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_spike_ends_the_run_unless_told_otherwise(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr("ov3fast.training.guard.LEAST", 3)
    spoiling(monkeypatch, [4], 100.0)
    with pytest.raises(SpikeError, match="step 4 of stage s0: loss .* is a spike, the median of the last ones is .* replay"):
        train(recipe_of(tiny, data, tmp_path, spike_factor=3.0))
    [path] = tmp_path.glob("spike-step-00000004-rank-0.json")
    assert json.loads(path.read_text())["median"] > 0
    # The same step again, whole this time: the run goes on.
    assert train(recipe_of(tiny, data, tmp_path, spike_factor=3.0), resume=True)["step"] == 6


def test_what_a_spike_is():
    recent: list[float] = []
    for n in range(2 * WINDOW):
        assert median_if_spike(recent, 1.0 + n % 2, 3.0) is None
    assert len(recent) == WINDOW
    assert median_if_spike(recent, 4.6, 3.0) == 1.5 and median_if_spike(recent, 4.4, 3.0) is None
    assert 4.6 not in recent and 4.4 in recent
    assert median_if_spike([1.0] * (LEAST - 1), 1e9, 3.0) is None


def test_the_wall_time_ends_a_run_with_a_checkpoint(tiny, data, tmp_path):
    recipe = tiny.recipe(data, tmp_path, ((100_000, 32),), gradient_norms_every=None, checkpoint_steps=None, wall_minutes=0.05)
    metrics = train(recipe)
    assert metrics["interrupted"] and metrics["step"] >= 1
    assert checkpoint.latest(tmp_path / "checkpoints").state["progress"]["step"] == metrics["step"]
