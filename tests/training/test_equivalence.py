"""One run and one step on 1, 2, 3 and 4 processes, in every way of holding and computing the model: the same numbers.

A step is 12 micro-batches, accumulated and dealt over the processes, so that all runs are the same sums in other orders; every run keeps an average
of its weights. Bounds: float32 runs as in test_distributed; bfloat16 runs, whose roundings differ (FSDP gathers norms and biases in bfloat16 too),
by their losses.
"""

from pathlib import Path

import pytest
import torch

from ov3fast.training import checkpoint, train
from ov3fast.training.distributed import ALONE
from ov3fast.training.logs import read_rows

BOUND = 1e-5
"""Largest difference of a weight or its average after 5 float32 steps at 1e-3 (eps 1e-6, so that noise is not amplified)."""
EXACT = 1e-10
"""Of float64 gradients, relative to the largest of their tensor."""
BF16_LOSS = 0.02
"""Relative difference of a bfloat16 run's losses."""

FSDP, RING, COMPILED = {"parallel": "fsdp"}, {"contrastive_exchange": "ring"}, {"compile": True}
BLOCKS = {"activation_checkpointing": True}
MLPS = {**BLOCKS, "recompute": "mlp"}
WAYS = {
    1: {"ddp": {}, "fsdp, ring": {**FSDP, **RING}, "compiled, mlps recomputed": {**COMPILED, **MLPS}},
    2: {
        "ddp": {},
        "ddp, ring": RING,
        "ddp, blocks recomputed": BLOCKS,
        "ddp, mlps recomputed": MLPS,
        "ddp, compiled": COMPILED,
        "fsdp": FSDP,
        "fsdp, ring": {**FSDP, **RING},
        "fsdp, kept gathered": {**FSDP, "reshard": False},
        "fsdp, blocks recomputed": {**FSDP, **BLOCKS},
        "fsdp, compiled, mlps recomputed": {**FSDP, **COMPILED, **MLPS},
        "hsdp, copies alone": {"parallel": "hsdp", "shard_size": 1},
    },
    3: {"ddp": {}, "fsdp": FSDP, "fsdp, ring": {**FSDP, **RING}},
    4: {
        "ddp, ring": RING,
        "fsdp": FSDP,
        "hsdp": {"parallel": "hsdp", "shard_size": 2},
        "hsdp, ring, compiled, blocks recomputed": {"parallel": "hsdp", "shard_size": 2, **RING, **COMPILED, **BLOCKS},
    },
}
"""Number of processes -> name -> recipe fields."""
pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=WAYS)
def launched(request, data, server, tmp_path_factory) -> tuple[int, Path]:
    """(processes, folder) after all ways of that many have run."""
    world, out = request.param, tmp_path_factory.mktemp(f"world-{request.param}")
    jobs = [{"name": name, "do": "train", "fields": fields} for name, fields in WAYS[world].items()]
    jobs += [{"name": f"gradients, {name}", "do": "gradients", "fields": fields} for name, fields in WAYS[world].items()]
    server.run(world, data, out, jobs, limit=1200)
    return world, out


@pytest.fixture(scope="module")
def one(tiny, many_ranks, data, tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    train(many_ranks.recipe_of(tiny, data, folder, 12, 1))
    return folder


def assert_same_run(one: Path, other: Path, name: str) -> None:
    a, b = checkpoint.latest(one / "checkpoints"), checkpoint.latest(other / "checkpoints")
    assert a.state["progress"]["order_hash"] == b.state["progress"]["order_hash"]
    for group in ("model", "ema"):
        worst = max(float((value - b.tensors[group][key]).abs().max()) for key, value in a.tensors[group].items())
        assert worst <= BOUND, (name, group, worst)
    for row, other_row in zip(read_rows(one / "log.jsonl"), read_rows(other / "log.jsonl"), strict=True):
        for part in ("loss", "pixel", "latent", "caption", "contrastive", "rec", "und", "grad_norm"):
            expected = pytest.approx(row[part], rel=1e-3 if part == "grad_norm" else 1e-4)
            assert other_row[part] == expected, (name, row["step"], part)


def test_the_same_losses_and_weights(one, launched):
    world, out = launched
    for name in WAYS[world]:
        assert_same_run(one, out / name, f"{world}: {name}")


def test_the_contrastive_loss_is_exact(tiny, many_ranks, data, tmp_path, launched):
    world, out = launched
    recipe = many_ranks.contrastive_alone(tiny, data, tmp_path, 12, 1, objective=many_ranks.CONTRASTIVE)
    expected = many_ranks.gradients(recipe, ALONE)
    for name in WAYS[world]:
        found = torch.load(out / f"gradients, {name}.pt")
        assert set(found) == set(expected) and "text.head.weight" in found and "logit_scale" in found
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= EXACT * value.abs().max(), (name, key)


def test_other_numbers_of_processes_go_on(tiny, many_ranks, data, tmp_path, one, server):
    """Two processes, then one, then three, in another way each time: the samples of a run that one process did."""
    where = tmp_path / "run"

    def run_of(world: int, **fields) -> None:
        server.run(world, data, tmp_path, [{"name": "run", "do": "train", "fields": {"checkpoint_steps": 1, **FSDP, **fields}}])

    run_of(2)
    folders = checkpoint.Folder(where / "checkpoints")

    def forget(after: int) -> None:
        """What the run did after this step, as if it had been killed there."""
        for step in checkpoint.steps(folders):
            if step > after:
                folders.fs.rm(f"{folders.root}/step-{step:08d}", recursive=True)
        (where / "summary.json").unlink(missing_ok=True)

    forget(2)
    train(many_ranks.recipe_of(tiny, data, where, 12, 1, checkpoint_steps=1), resume=True)
    forget(4)
    run_of(3, resume=True)
    assert_same_run(one, where, "2 -> 1 -> 3")
    assert [row["step"] for row in read_rows(where / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_in_bfloat16(data, tmp_path, server):
    jobs = [
        {"name": kind, "do": "train", "fields": {"parallel": kind, "precision": "bf16", "gradient_norms_every": None}}
        for kind in ("ddp", "fsdp")
    ]
    server.run(2, data, tmp_path, jobs)
    for row, other in zip(*(read_rows(tmp_path / kind / "log.jsonl") for kind in ("ddp", "fsdp")), strict=True):
        for part in ("loss", "pixel", "latent", "caption", "contrastive"):
            assert other[part] == pytest.approx(row[part], rel=BF16_LOSS), (row["step"], part)
