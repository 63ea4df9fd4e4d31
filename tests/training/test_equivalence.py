"""One run and one step on 1, 2, 3 and 4 processes, with every --parallel mode: the same results.

A step is 12 micro-batches, distributed over the processes, so that all runs are the same sums in different orders. Bounds: float32 runs as in
test_distributed; bfloat16 runs, whose rounding differs (FSDP gathers norms and biases in bfloat16 too), by their losses.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ov3fast.training import checkpoint, train
from ov3fast.training.distributed import ALONE
from ov3fast.training.logs import read_rows

BOUND = 1e-5
"""Largest difference of a weight or its EMA after 5 float32 steps at 1e-3 (eps 1e-6, so that noise is not amplified)."""
EXACT = 1e-10
"""Largest error of float64 gradients, relative to the largest in their tensor."""
BF16_LOSS = 0.02
"""Relative difference of a bfloat16 run's losses."""

WAYS = {
    2: {
        "ddp": {},
        "fsdp": {"parallel": "fsdp"},
        "fsdp-kept": {"parallel": "fsdp", "reshard": False},
        "fsdp-recomputed": {"parallel": "fsdp", "activation_checkpointing": True},
        "hsdp-copies": {"parallel": "hsdp", "shard_size": 1},
        "ddp-recomputed": {"activation_checkpointing": True},
    },
    3: {"ddp": {}, "fsdp": {"parallel": "fsdp"}, "fsdp-ring": {"parallel": "fsdp", "contrastive_exchange": "ring"}},
    4: {"hsdp": {"parallel": "hsdp", "shard_size": 2}, "fsdp": {"parallel": "fsdp"}},
}
pytestmark = pytest.mark.full


def launch(world: int, data: Path, out: Path, jobs: list[dict], timeout: int = 600) -> None:
    file = out / f"jobs-{world}.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("many_ranks.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
        script,
        data,
        out,
        file,
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.fixture(scope="module", params=WAYS)
def launched(request, data, tmp_path_factory) -> tuple[int, Path]:
    """(processes, folder) after all modes have run with that many processes."""
    world, out = request.param, tmp_path_factory.mktemp(f"world-{request.param}")
    jobs = [{"name": f"gradients-{name}", "do": "gradients", "fields": fields} for name, fields in WAYS[world].items()]
    jobs += [{"name": name, "do": "train", "fields": fields} for name, fields in WAYS[world].items()]
    launch(world, data, out, jobs)
    return world, out


@pytest.fixture(scope="module")
def one(tiny, many_ranks, data, tmp_path_factory) -> Path:
    """The single-process run."""
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
            assert other_row[part] == pytest.approx(row[part], rel=1e-3 if part == "grad_norm" else 1e-4), (
                name,
                row["step"],
                part,
            )


def test_the_same_losses_and_weights(one, launched):
    world, out = launched
    for name in WAYS[world]:
        assert_same_run(one, out / name, f"{world} {name}")


def test_the_contrastive_loss_is_exact(tiny, many_ranks, data, tmp_path, launched):
    world, out = launched
    recipe = many_ranks.contrastive_alone(tiny, data, tmp_path, 12, 1, objective=many_ranks.CONTRASTIVE)
    expected = many_ranks.gradients(recipe, ALONE)
    for name in WAYS[world]:
        found = torch.load(out / f"gradients-{name}.pt")
        assert set(found) == set(expected) and "text.head.weight" in found and "logit_scale" in found
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= EXACT * value.abs().max(), (name, key)


def test_other_numbers_of_processes_go_on(tiny, many_ranks, data, tmp_path, one):
    """Two processes, then one, then three, each time with another mode: the same samples as in a single-process run."""
    where = tmp_path / "run"

    def stage_of(steps):
        return {"stages": steps, "checkpoint_steps": 1}

    launch(2, data, tmp_path, [{"name": "run", "do": "train", "fields": {"parallel": "fsdp", **stage_of(((3, 32), (2, 48)))}}])
    folders = checkpoint.Folder(where / "checkpoints")

    def forget(after: int) -> None:
        """Removes what the run did after this step, as if it had been killed there."""
        for step in checkpoint.steps(folders):
            if step > after:
                folders.fs.rm(f"{folders.root}/step-{step:08d}", recursive=True)
        (where / "summary.json").unlink(missing_ok=True)

    forget(2)
    train(many_ranks.recipe_of(tiny, data, where, 12, 1, checkpoint_steps=1), resume=True)
    forget(4)
    launch(
        3,
        data,
        tmp_path,
        [{"name": "run", "do": "train", "fields": {"parallel": "fsdp", "checkpoint_steps": 1, "resume": True}}],
    )
    assert_same_run(one, where, "2 -> 1 -> 3")
    assert [row["step"] for row in read_rows(where / "log.jsonl")] == [1, 2, 3, 4, 5]


def test_in_bfloat16(data, tmp_path):
    jobs = [
        {"name": kind, "do": "train", "fields": {"parallel": kind, "precision": "bf16", "gradient_norms_every": None}}
        for kind in ("ddp", "fsdp")
    ]
    launch(2, data, tmp_path, jobs)
    for row, other in zip(*(read_rows(tmp_path / kind / "log.jsonl") for kind in ("ddp", "fsdp")), strict=True):
        for part in ("loss", "pixel", "latent", "caption", "contrastive"):
            assert other[part] == pytest.approx(row[part], rel=BF16_LOSS), (row["step"], part)
