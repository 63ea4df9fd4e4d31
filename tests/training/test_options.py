"""The recipe's switches, each in a short run."""

import dataclasses
import functools
import math

import pytest
import torch

from ov3fast.models.config import LPIPSConfig, OpenVision3Config
from ov3fast.models.perceptual import LPIPS, build_lpips
from ov3fast.training import checkpoint, loop, train
from ov3fast.training.logs import read_rows
from ov3fast.training.optimizer import AdamW

SHORT = ((2, 32),)


def rows(recipe):
    metrics = train(recipe)
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    return read_rows(recipe.run_dir / "log.jsonl")


def near(row, other, rel):
    names = [name for name in ("loss", "grad_norm", "rec_grad_norm", "und_grad_norm") if name in other]
    return [row[name] for name in names] == pytest.approx([other[name] for name in names], rel=rel)


@pytest.fixture(scope="module")
def plain(tiny, data, tmp_path_factory):
    return rows(tiny.recipe(data, tmp_path_factory.mktemp("plain"), SHORT))


def test_activation_checkpointing_changes_nothing(tiny, data, tmp_path, plain):
    found = rows(tiny.recipe(data, tmp_path, SHORT, activation_checkpointing=True))
    for row, other in zip(found, plain, strict=True):
        assert near(row, other, 1e-6)


def test_compiled_towers_give_the_same_losses(tiny, data, tmp_path, plain, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = rows(tiny.recipe(data, tmp_path, SHORT, compile=True))
    for row, other in zip(found, plain, strict=True):
        assert near(row, other, 1e-3)
    assert "encoder.patch_embed.weight" in checkpoint.latest(tmp_path / "checkpoints").tensors["model"]


def test_bf16_autocast_is_near(tiny, data, tmp_path, plain):
    found = rows(tiny.recipe(data, tmp_path, SHORT, precision="bf16", latent_dtype="bf16", accumulate=2))
    assert found[0]["caption"] == pytest.approx(plain[0]["caption"], rel=0.05)
    assert found[0]["contrastive"] == pytest.approx(plain[0]["contrastive"], rel=0.05)
    tensors = checkpoint.latest(tmp_path / "checkpoints").tensors
    assert {value.dtype for group in tensors.values() for value in group.values()} == {torch.float32}


def test_flux_latents_sampled_sigmoid_pairs_queries_and_workers(tiny, data, tmp_path):
    recipe = tiny.recipe(data, tmp_path, SHORT, cache_latents=False, gradient_norms_every=None)
    caption = dataclasses.replace(recipe.model.caption, style="queries", text_prefix=True, visual_keep=0.5)
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model, latent_convention="flux", posterior="sample", contrastive="sigmoid", caption=caption
        ),
        objective=dataclasses.replace(recipe.objective, contrastive="sigmoid"),
        optimizer=dataclasses.replace(recipe.optimizer, ema_decay=None, clip_norm=None),
        data=dataclasses.replace(recipe.data, workers=1, variants=None, cache_images=False),
    )
    found = rows(recipe)
    assert len(found) == 2 and "rec_grad_norm" not in found[0]
    assert set(checkpoint.latest(tmp_path / "checkpoints").tensors) == {"model", "optimizer"}


def test_a_stage_with_lpips(tiny, data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loop, "build_lpips", lambda *_: LPIPS("squeezenet"))
    recipe = tiny.recipe(data, tmp_path, ((1, 32), (2, 32)))
    second = dataclasses.replace(recipe.stages[1], lpips_weight=0.5)
    found = rows(dataclasses.replace(recipe, stages=(recipe.stages[0], second)))
    assert ["lpips" in row for row in found] == [False, True, True]
    row = found[-1]
    assert row["rec"] == pytest.approx(row["pixel"] + 0.4 * row["latent"] + 0.5 * row["lpips"], rel=1e-5)
    assert row["und"] == pytest.approx(row["caption"] + row["contrastive"], rel=1e-5)
    assert row["loss"] == pytest.approx(0.5 * row["rec"] + row["und"], rel=1e-5)


def test_one_branch_alone_leaves_the_other_untouched(tiny, data, tmp_path):
    recipe = tiny.recipe(data, tmp_path, SHORT)
    found = rows(dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, rec_weight=0.0)))
    assert "latent" not in found[0] and found[0]["rec_grad_norm"] == 0.0
    moments = checkpoint.latest(tmp_path / "checkpoints").tensors["optimizer"]
    assert not any(value.any() for name, value in moments.items() if "decoder." in name and "captioner" not in name)


def test_minutes_end_a_stage_and_checkpoint_it(tiny, data, tmp_path):
    recipe = tiny.recipe(data, tmp_path, SHORT, checkpoint_steps=None, checkpoint_minutes=1e-6)
    stage = dataclasses.replace(recipe.stages[0], steps=None, minutes=0.01, warmup_steps=None, warmup_fraction=0.1)
    metrics = train(dataclasses.replace(recipe, stages=(stage,)))
    assert 0.6 <= metrics["seconds"] < 60
    kept = checkpoint.steps(tmp_path / "checkpoints")
    assert kept[-1] == metrics["step"] and len(kept) == min(metrics["step"], recipe.keep)
    rates = [row["lr"] for row in read_rows(tmp_path / "log.jsonl")]
    assert rates[0] == 0.0 and max(rates) <= 1e-3


def test_lpips_without_weights_is_one_clear_line():
    with pytest.raises(ValueError, match="lpips.weights: vgg16 needs its torchvision weights file"):
        build_lpips(LPIPSConfig(), torch.device("cpu"), fetch=None)


@pytest.mark.parametrize(("bound", "found"), [(100.0, 100.0), (20.0, 20.0), (None, math.exp(5.0))])
def test_the_logit_scale_is_bounded(tiny, data, tmp_path, monkeypatch, bound, found):
    recipe = tiny.recipe(data, tmp_path, ((1, 32),))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, logit_scale_max=bound))
    step = AdamW.step

    def eager(self, closure=None):
        step(self, closure)
        self.parameters["logit_scale"].data.fill_(5.0)

    monkeypatch.setattr(AdamW, "step", eager)
    assert rows(recipe)[-1]["logit_scale"] == pytest.approx(found, rel=1e-5)


def test_a_bound_below_the_first_logit_scale():
    with pytest.raises(ValueError, match="logit_scale_max must be at least logit_scale_init = 10 or None, got 5"):
        OpenVision3Config(logit_scale_init=10.0, logit_scale_max=5.0)
