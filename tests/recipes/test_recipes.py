import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.losses import ObjectiveConfig
from ov3fast.models.config import OpenVision3Config
from ov3fast.recipes import NAMES, OptimizerConfig, Recipe, Stage, get_recipe


def stage(**changes):
    return Stage(**{"name": "s", "image_size": 64, "batch_size": 8, "base_lr": 1e-3, "steps": 5, **changes})


def test_base_is_table_1():
    recipe = get_recipe("base")
    first, second = recipe.stages
    assert (first.image_size, first.batch_size, first.base_lr, first.epochs, first.warmup_epochs) == (128, 8192, 8e-6, 4000, 40)
    assert (second.image_size, second.batch_size, second.base_lr, second.epochs, second.warmup_epochs) == (
        256,
        4096,
        4e-7,
        400,
        20,
    )
    assert (first.lpips_weight, second.lpips_weight) == (0.0, 0.5)
    assert first.samples_per_epoch == second.samples_per_epoch == 1_281_167
    weights = recipe.objective
    assert (weights.latent_weight, weights.contrastive_weight, weights.rec_weight, weights.und_weight) == (0.4, 1.0, 0.5, 1.0)
    assert (weights.pixel_weight, weights.caption_weight) == (1.0, 1.0)
    assert recipe.optimizer.betas == (0.9, 0.95) and recipe.optimizer.weight_decay == 0.2


def test_large_differs_in_the_towers_only():
    base, large = get_recipe("base"), get_recipe("large")
    assert large.model.vision.width == 1024 and large.model.vision.depth == 24
    assert large.model.decoder == base.model.decoder
    assert dataclasses.replace(large, name=base.name, model=base.model, run_dir=base.run_dir) == base


def test_an_unknown_name():
    with pytest.raises(ValueError, match="name must be one of demo, base, large, custom; got 'huge'"):
        get_recipe("huge")


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_json(name):
    recipe = get_recipe(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.difference(json.loads(json.dumps(recipe.to_dict()))) is None


def test_an_unknown_key_is_named():
    values = get_recipe("demo").to_dict()
    values["stages"][1]["stride"] = 3
    with pytest.raises(ValueError, match=r"Recipe.stages\[1\]: unknown key 'stride'"):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("name",), 3, "Recipe.name: takes str, got 3"),
        (("run_dir",), 7, "Recipe.run_dir: takes a path, got 7"),
        (("seed",), "a", "Recipe.seed: takes int, got 'a'"),
        (("seed",), True, "Recipe.seed: takes int, got True"),
        (("precision",), "fp8", "Recipe.precision: takes 'bf16' or 'fp32', got 'fp8'"),
        (("optimizer", "betas"), [0.9], r"Recipe.optimizer.betas: takes a list of 2, got \[0.9\]"),
        (("optimizer", "eps"), float("nan"), "Recipe.optimizer.eps: takes float, got nan"),
        (("stages", 0, "image_size"), "b", r"Recipe.stages\[0\].image_size: takes int, got 'b'"),
        (("stages", 0, "steps"), 1.5, r"Recipe.stages\[0\].steps: takes int or null, got 1.5"),
        (("stages",), 3, "Recipe.stages: takes a list, got 3"),
        (("data", "sources"), "abc", "Recipe.data.sources: takes a list, got 'abc'"),
        (("data", "sources", 0), {"fraction": 1}, r"Recipe.data.sources\[0\]: needs path"),
    ],
)
def test_values_of_the_wrong_kind_are_named(where, value, message):
    values = place = json.loads(json.dumps(get_recipe("demo").to_dict()))
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(values)


def test_every_field_can_be_set_on_the_command_line():
    recipe = tyro.cli(
        Recipe,
        default=get_recipe("demo"),
        args=(
            "--stages.0.minutes None --stages.0.steps 20 --stages.1.lpips-weight 0 --optimizer.betas 0.8 0.9 --model.vision.depth 2 "
            "--data.sources.0.captions alt 1.0 --run-dir elsewhere --objective.latent-weight 0.1 --vae small --compile"
        ).split(),
    )
    assert recipe.stages[0].steps == 20 and recipe.stages[0].minutes is None
    assert recipe.stages[1].lpips_weight == 0
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.model.vision.depth == 2
    assert recipe.data.sources[0].captions == (("alt", 1.0),)
    assert recipe.run_dir == Path("elsewhere") and recipe.compile and recipe.objective.latent_weight == 0.1


def test_the_differing_field_is_named():
    recipe = get_recipe("demo")
    other = dataclasses.replace(recipe, stages=(recipe.stages[0], dataclasses.replace(recipe.stages[1], base_lr=3e-4)))
    assert other.difference(recipe.to_dict()) == "stages.1.base_lr: 0.0002 -> 0.0003"
    assert "stages.1" in dataclasses.replace(recipe, stages=recipe.stages[:1]).difference(recipe.to_dict())
    free = dataclasses.replace(recipe, run_dir=Path("x"), log_every=3, data=dataclasses.replace(recipe.data, workers=4))
    assert free.difference(recipe.to_dict()) is None


def test_the_vae_flag_reaches_the_model():
    recipe = dataclasses.replace(get_recipe("base"), vae="some/folder").resolve()
    assert recipe.model.vae == "some/folder"


def test_a_stage_that_decodes_nothing_has_no_pixel_loss():
    recipe = Recipe("r", stages=(stage(pixel_images=0), stage(name="t", lpips_weight=0.5)))
    assert not recipe.stage_objective(recipe.stages[0]).needs_pixels
    assert recipe.stage_objective(recipe.stages[1]).lpips_weight == 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: stage(steps=None), "set exactly one of epochs, steps and minutes, got none"),
        (lambda: stage(minutes=3.0), "set exactly one of epochs, steps and minutes, got {'steps': 5, 'minutes': 3.0}"),
        (lambda: stage(steps=0), "steps must be positive, got 0"),
        (lambda: stage(warmup_steps=1, warmup_fraction=0.1), "at most one of warmup_epochs, warmup_steps and warmup_fraction"),
        (lambda: stage(warmup_fraction=1.5), r"warmup_fraction must be in \[0, 1\], got 1.5"),
        (lambda: stage(steps=None, minutes=1.0, warmup_epochs=1), "measured in minutes takes warmup_fraction or warmup_steps"),
        (lambda: stage(pixel_images=9), r"pixel_images must be in 0..batch_size = 8, got 9"),
        (lambda: stage(pixel_images=0, lpips_weight=0.5), "needs pixel_images above 0"),
        (lambda: stage(latent_images=0), r"latent_images must be in 1..batch_size = 8, got 0"),
        (lambda: stage(latent_images=4, pixel_images=5), r"pixel_images must be in 0..latent_images = 4, got 5"),
        (lambda: Recipe("r"), "stages must hold at least one stage"),
        (lambda: Recipe("r", stages=(stage(), stage())), "stages must have different names, got s, s"),
        (lambda: Recipe("r", stages=(stage(image_size=40),)), "image_size must be a multiple of 16 pixels, got 40"),
        (lambda: Recipe("r", stages=(stage(),), accumulate=3), "batch_size 8 is not divisible by accumulate = 3"),
        (lambda: Recipe("r", stages=(stage(),), cache_latents=True), "cache_latents needs data.variants and data.cache_images"),
        (
            lambda: Recipe("r", stages=(stage(),), objective=ObjectiveConfig(lpips_weight=0.5)),
            "set stages.N.lpips_weight",
        ),
        (
            lambda: Recipe("r", stages=(stage(),), model=OpenVision3Config(contrastive="sigmoid")),
            "objective.contrastive is 'softmax', model.contrastive 'sigmoid'",
        ),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm must be positive or None, got 0.0"),
    ],
)
def test_errors_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_sources_compare_as_tuples():
    data = DataConfig(sources=(SourceConfig(path="x", captions=(("a", 1.0),)),))
    recipe = Recipe("r", stages=(stage(),), data=data)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).data == data
