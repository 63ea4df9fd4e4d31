"""`ov3fast plan`: memory against a measured step, FLOPs against FlopCounterMode, and the paper's run."""

import dataclasses
import gc
import json

import pytest
import torch

from ov3fast.cli import main
from ov3fast.losses import Objective
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE
from ov3fast.recipes import get_recipe
from ov3fast.training.cluster import CHIPS, estimate
from ov3fast.training.distributed import Ranks
from ov3fast.training.footprint import blank_micro_batch, footprint
from ov3fast.training.parallel import Parallel
from ov3fast.training.plan import make_plan
from ov3fast.training.step import Step
from ov3fast.training.timing import Timer

IMAGES = 24


def small(**changes):
    """The demo's model with a small vocabulary and one stage."""
    demo = get_recipe("demo")
    model = dataclasses.replace(
        demo.model,
        text=dataclasses.replace(demo.model.text, vocab_size=512),
        caption=dataclasses.replace(demo.model.caption, vocab_size=512),
    )
    stage = dataclasses.replace(
        demo.stages[0], batch_size=IMAGES, latent_images=None, pixel_images=None, caption_images=None, lpips_weight=0.0
    )
    return dataclasses.replace(demo, model=model, stages=(stage,), cache_latents=False, **changes)


def measured_peak(recipe) -> int:
    """Peak allocation during the step, excluding weights and gradients, in bytes."""
    stage, config = recipe.stages[0], recipe.stage_objective(recipe.stages[0])
    model = OpenVision3(recipe.model).train()
    model.set_activation_checkpointing(recipe.activation_checkpointing, recipe.recompute)
    dtype = torch.float32 if recipe.vae_dtype == "fp32" else torch.bfloat16
    model.set_vae(FrozenVAE.from_pretrained(recipe.model.vae, dtype=dtype))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    step = Step(
        Parallel(model, recipe, Ranks(0, 1, torch.device("cpu"))), Objective(config), Timer(torch.device("cpu")),
        bf16=recipe.precision == "bf16", exact_contrastive=True,
    )  # fmt: skip
    gc.collect()  # what loading left behind would be released within the step
    with torch.profiler.profile(profile_memory=True) as profile:
        step([blank_micro_batch(recipe, stage, IMAGES, model.get_vae())])
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        peak = max(peak, now)
    return peak


RECOMPUTE = {
    "nothing": {},
    "blocks": {"activation_checkpointing": True},
    "mlps": {"activation_checkpointing": True, "recompute": "mlp"},
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", RECOMPUTE)
def test_memory_is_that_of_a_measured_step(precision, checkpointing):
    recipe = small(precision=precision, **RECOMPUTE[checkpointing])
    assert footprint(recipe, 0, IMAGES).activations == pytest.approx(measured_peak(recipe), rel=0.05)


@pytest.mark.full
def test_flops_are_those_that_are_counted():
    for recipe in (*(small(**changes) for changes in RECOMPUTE.values()), get_recipe("base")):
        planned = make_plan(recipe).stages[-1]
        images = planned.stage.batch_size if recipe.name == "demo" else 2
        assert planned.flops_per_sample == pytest.approx(footprint(recipe, -1, images).flops_per_image, rel=0.01)


def test_more_images_take_more_memory_and_checkpointing_less():
    few, many = (footprint(small(), 0, images).activations for images in (8, 16))
    assert 1.5 * few < many < 2.1 * few
    blocks, mlps = (footprint(small(**RECOMPUTE[name]), 0, 16).activations for name in ("blocks", "mlps"))
    assert blocks < mlps < many


@pytest.mark.full
def test_the_papers_run(capsys):
    assert main(["plan", "--recipe", "base", "--gpus", "256", "--device", "h100", "--price", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    pretrain, finetune = plan["stages"]
    assert (pretrain["steps"], finetune["steps"]) == (625_570, 125_114)
    assert (pretrain["micro_batch"], finetune["micro_batch"]) == (32, 16)
    assert pretrain["compute_s"] == pytest.approx(568.7e9 * 32 / (0.4 * 989e12), rel=1e-3)
    weights = pretrain["footprint"]["weights"]
    assert pretrain["exchange_bytes"] == pytest.approx(255 / 256 * (2 * weights + 4 * 4 * 768 * 8192))
    assert plan["gpu_hours"] == pytest.approx(24 * 256 * plan["days"]) and plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
    assert pretrain["footprint"]["total"] < 80e9


def test_the_table_names_what_bounds_the_step(tmp_path, capsys):
    assert main(["plan", "--recipe", "demo", "--gpus", "1", "--device", "a100", "--loader-rate", "100"]) == 0
    text = capsys.readouterr().out
    assert "follow the clock" in text and "the loader is slower than the compute" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "h900"), "--device must be one of a100, h100, h200, b200; got 'h900'"),
        (("--gpus", "0"), "gpus must be at least 1, got 0"),
        (("--gpus", "7"), "batch_size 8192 is not divisible by 7 process(es)"),
        (("--mfu", "40"), "mfu must be in (0, 1], got 40"),
        (("--price", "-1"), "price must be positive, got -1"),
        (("--recipe", "huge"), "must be one of"),
    ],
)
def test_refusals(flags, words, capsys):
    assert main(["plan", *flags]) == 2
    assert words in capsys.readouterr().err


def test_too_little_memory_is_said():
    tight = dataclasses.replace(CHIPS["h100"], memory_gb=0.1)
    plan = estimate(small(), 1, tight)
    assert plan.stages[0].suggestions[0] == "does not fit: activation_checkpointing"
