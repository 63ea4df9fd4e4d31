"""`train --capture` on the stand-in for CUDA graphs, where reading a value during a recording raises and recording computes nothing."""

import dataclasses

import pytest
import torch
from kernel_tools.graphs import graphs_on_cpu, our_kernels
from safetensors.torch import load_file

from ov3fast import testing
from ov3fast.training import capture, train
from ov3fast.training.distributed import Ranks
from ov3fast.training.optimizer import AdamW

STEPS = ((6, 32),)


def weights(run_dir):
    return load_file(run_dir / "model" / "model.safetensors")


def scheduled(monkeypatch):
    """A run without graphs whose optimizer reads its numbers from tensors, as a captured one does."""
    init = AdamW.__init__

    def with_schedule(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.read_schedule_from(torch.device("cpu"))

    monkeypatch.setattr(AdamW, "__init__", with_schedule)


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2}, {"activation_checkpointing": True, "precision": "bf16"}],
    ids=["plain", "accumulate", "bf16"],
)
def test_a_captured_run_has_the_bits_of_one_that_is_not(tiny, data, tmp_path, changes, monkeypatch):
    changes = {"gradient_norms_every": 5, **changes}
    with graphs_on_cpu() as machine:
        captured = train(tiny.recipe(data, tmp_path / "captured", STEPS, capture=True, **changes))
    # Steps 0 and 5 measure; 1 to 4 replay both graphs, which were recorded once.
    assert machine.recordings == 2 and machine.replays == 8
    scheduled(monkeypatch)
    with our_kernels():
        plain = train(tiny.recipe(data, tmp_path / "plain", STEPS, **changes))
    ours, theirs = weights(tmp_path / "captured"), weights(tmp_path / "plain")
    testing.assert_same_bits(list(ours.values()), list(theirs.values()))
    assert captured["loss"] == plain["loss"] and captured["grad_norm"] == plain["grad_norm"]


def test_a_scheduled_run_is_near_one_with_numbers(tiny, data, tmp_path, monkeypatch):
    changes = {"impl": "eager"}
    plain = train(tiny.recipe(data, tmp_path / "plain", STEPS, **changes))
    scheduled(monkeypatch)
    other = train(tiny.recipe(data, tmp_path / "other", STEPS, **changes))
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_another_shape_is_recorded_beside_it_and_the_oldest_goes(tiny, data, tmp_path, monkeypatch):
    """Batches of varying size, as from grouped sources."""
    monkeypatch.setattr(capture, "MOST", 1)
    calls = []

    class Fake:
        ranks = Ranks(0, 1, torch.device("cpu"))

        def __init__(self, model):
            self.model = model

        def __call__(self, micro_batches, measure=False):
            loss = (self.model.weight * micro_batches[0].latents).sum()
            loss.backward()
            return {"loss": loss.detach()}, {}

        def update(self, optimizer):
            calls.append("eager")
            optimizer.step()

    model = torch.nn.Linear(4, 1, bias=False)
    model.clamp_logit_scale = lambda: None
    optimizer = AdamW(model, tiny.recipe(data, tmp_path).optimizer, lr=0.1)
    with graphs_on_cpu() as machine:
        step = capture.CapturedStep(Fake(model), optimizer)
        for size in (1, 1, 1, 2, 1, 1):
            optimizer.zero_grad()
            losses, _ = step([micro_batch(torch.full((size, 4), float(size)))])
            testing.assert_same_bits([losses["loss"]], [(model.weight * torch.full((size, 4), float(size))).sum().detach()])
            assert torch.equal(model.weight.grad, torch.full((1, 4), float(size * size)))
            step.update(optimizer)
    # 1 eager, recorded, replayed; 2 eager and in its place; 1 eager again and recorded again.
    assert calls == ["eager"] * 3 and machine.recordings == 4 and optimizer.steps == 6


def micro_batch(latents):
    names = [field.name for field in dataclasses.fields(capture.MicroBatch)]
    values = dict.fromkeys(names) | {
        "keys": [],
        "latents": latents,
        "rng": torch.zeros(2, dtype=torch.int64),
        "caption_share": 1.0,
    }
    return capture.MicroBatch(**values)


def test_what_can_not_be_captured_is_refused(tiny, data, tmp_path):
    recipe = tiny.recipe(data, tmp_path, capture=True)
    with pytest.raises(ValueError, match="^capture: CUDA graphs need a GPU, and this is on cpu$"):
        train(recipe, device="cpu")
    with graphs_on_cpu():
        with pytest.raises(ValueError, match="capture: a step is captured in runs of one process, and this one has 2"):
            capture.check(recipe, Ranks(0, 2, torch.device("cpu"), group=object()))
        with pytest.raises(ValueError, match="capture: synchronize_timing waits"):
            capture.check(dataclasses.replace(recipe, synchronize_timing=True), Ranks(0, 1, torch.device("cpu")))
