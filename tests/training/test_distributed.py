"""Two processes under torchrun on gloo against one, and the pieces that make them equal."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ov3fast import ops
from ov3fast.data.store import SampleStore
from ov3fast.training import build, checkpoint, distributed, train
from ov3fast.training.distributed import Ranks
from ov3fast.training.inputs import Inputs
from ov3fast.training.logs import read_rows
from ov3fast.training.stage import check_micro_batches
from ov3fast.training.timing import Timer

CPU = torch.device("cpu")
BOUND = 1e-5
"""Largest difference of a weight or its EMA after 8 float32 steps at 1e-3 (eps 1e-6, so that noise is not amplified)."""


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    """The output folder of two_ranks.py."""
    out = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, data, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_two_processes_equal_one_with_two_micro_batches(tiny, data, two, tmp_path):
    one = train(tiny.recipe(data, tmp_path, accumulate=2))
    results = [json.loads((two / f"rank-{rank}.json").read_text())[0] for rank in range(2)]
    assert {result["order_hash"] for result in results} == {one["order_hash"]}
    a, b = checkpoint.latest(tmp_path / "checkpoints"), checkpoint.latest(two / "whole" / "checkpoints")
    worst = max(
        float((value - b.tensors[group][name]).abs().max())
        for group in ("model", "ema")
        for name, value in a.tensors[group].items()
    )
    assert worst <= BOUND
    rows, others = read_rows(tmp_path / "log.jsonl"), read_rows(two / "whole" / "log.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in ("loss", "pixel", "latent", "caption", "contrastive", "rec", "und", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-3 if name == "grad_norm" else 1e-4), (row["step"], name)


def test_a_signal_to_one_process_stops_both_and_resumes_to_the_same_bits(two):
    for rank in range(2):
        whole, stopped, resumed = json.loads((two / f"rank-{rank}.json").read_text())
        assert stopped["interrupted"] and stopped["step"] == 5
        assert not resumed["interrupted"] and resumed["order_hash"] == whole["order_hash"]
    a, b = (checkpoint.latest(two / name / "checkpoints") for name in ("whole", "stopped"))
    for group, tensors in a.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, b.tensors[group][name]), (group, name)
    assert [row["step"] for row in read_rows(two / "stopped" / "log.jsonl")] == list(range(1, 9))


def inputs_of(recipe, ranks):
    store, timer = SampleStore(recipe.data), Timer(CPU)
    model = build.build_model(recipe, build.build_tokenizer(recipe, store), CPU)
    inputs = Inputs(recipe, 0, recipe.stage_objective(recipe.stages[0]), model, store, ranks, timer, None)
    inputs.start(3, None)
    return inputs.next(3)


@pytest.mark.parametrize("reconstructed", [None, 16])
def test_with_one_source_every_number_is_a_function_of_the_place_in_the_global_batch(tiny, data, tmp_path, reconstructed):
    recipe = tiny.recipe(data, tmp_path, cache_latents=False)
    photos = dataclasses.replace(recipe.data.sources[0], group_by=None, views=1)
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, sources=(photos,)),
        model=dataclasses.replace(recipe.model, posterior="sample"),
        stages=(dataclasses.replace(recipe.stages[0], latent_images=reconstructed),),
    )
    (whole,), order = inputs_of(recipe, Ranks(0, 1, CPU))
    parts = []
    for rank in range(2):
        (part,), same = inputs_of(recipe, Ranks(rank, 2, CPU))
        assert (same == order).all()
        parts.append(part)
    assert parts[0].keys + parts[1].keys == whole.keys
    assert torch.equal(torch.cat([part.sigma for part in parts]), whole.sigma)
    count = reconstructed or 24
    assert whole.sigma.max() <= 0.8 and len(set(whole.sigma.tolist())) == count
    assert torch.allclose(torch.cat([part.latents for part in parts]), whole.latents, atol=1e-6)
    rows = {"pixel_rows": count // 2, "caption_rows": 12} | ({"latent_rows": 12} if reconstructed else {})
    for name, second in rows.items():
        assert torch.equal(torch.cat([getattr(parts[0], name), second + getattr(parts[1], name)]), getattr(whole, name))
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    noise = torch.cat([ops.random.normal((count // 2, 4, 32), part.rng) for part in parts])
    assert torch.equal(noise, ops.random.normal((count, 4, 32), whole.rng))


def test_a_batch_that_can_not_be_shared(tiny, data, tmp_path):
    recipe = tiny.recipe(data, tmp_path)
    check_micro_batches(recipe, 8)
    with pytest.raises(ValueError, match=r"stage 's0': batch_size 24 is not divisible by 5 process\(es\) x 1 micro-batch"):
        check_micro_batches(recipe, 5)
    with pytest.raises(ValueError, match="stage 's0': pixel_images 8 is not divisible by 3"):
        check_micro_batches(recipe, 3)


def test_one_process_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = distributed.start("cpu")
    assert (ranks.rank, ranks.world, ranks.first, ranks.group) == (0, 1, True, None)
    assert ranks.largest(1.0, 2.0) == [1.0, 2.0] and ranks.gather("x") == ["x"]


def test_half_of_torchruns_environment_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is set to '1' but RANK, .* is not; torchrun sets WORLD_SIZE, RANK"):
        distributed.start("cpu")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK is set to '1' but WORLD_SIZE, LOCAL_RANK, .* is not"):
        distributed.start("cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE = 2, got 2"),
    ],
)
def test_numbers_that_no_torchrun_sets(monkeypatch, changes, words):
    for name, value in {**dict.fromkeys(distributed.TORCHRUN, "1"), "WORLD_SIZE": "2", **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        distributed.start("cpu")


def test_devices_that_can_not_compute():
    for device in ("meta", "foo"):
        with pytest.raises(ValueError, match=f"train: device '{device}' can't be used here"):
            distributed.start(device)
