import io

import pytest
from rich.console import Console

from ov3fast.recipes import get_recipe
from ov3fast.training.plan import dry_run, make_plan


@pytest.fixture(scope="module")
def base():
    output = io.StringIO()
    return dry_run(get_recipe("base"), Console(file=output, width=160)), output.getvalue()


def test_base_resolves_to_the_papers_numbers(base):
    result, _ = base
    first, second = result.stages
    assert first.samples == 4000 * 1_281_167 == 5_124_668_000
    assert (first.schedule.steps, first.schedule.warmup_steps) == (625_570, 6_256)
    assert first.schedule.peak_lr == pytest.approx(2.56e-4)
    assert (second.schedule.steps, second.schedule.warmup_steps) == (125_114, 6_256)
    assert second.samples == 512_466_800 and second.schedule.peak_lr == pytest.approx(6.4e-6)
    assert (first.tokens, second.tokens) == (64, 256)


def test_base_counts(base):
    result, _ = base
    # The released tower has 257 * 768 position values besides; here they are a formula.
    assert result.parameters["encoder"] == 85_893_120 - 257 * 768
    assert result.parameters["vae"] == 83_819_683
    first = result.stages[0]
    flops = first.flops
    towers = 4 * (flops["encoder"] + flops["text"] + flops["decoder"] + flops["captioner"])
    assert first.flops_per_sample == pytest.approx(towers + flops["vae_encoder"] + 2 * flops["vae_decoder"])
    assert first.training_flops == pytest.approx(first.flops_per_sample * 625_570 * 8192)


def test_base_prints_all_of_it(base):
    _, text = base
    for part in (
        "625,570",
        "125,114",
        "6,256",
        "0.000256",
        "6.4e-06",
        "5,124,668,000",
        "85,695,744",
        "objective.latent_weight",
        "0.4",
    ):
        assert part in text, part


def test_demo_follows_the_clock(tmp_path):
    output = io.StringIO()
    result = dry_run(get_recipe("demo"), Console(file=output, width=160))
    assert all(stage.schedule.steps is None and stage.training_flops is None for stage in result.stages)
    assert "follow the clock" in output.getvalue()
    stage = result.stages[0]
    # Two images share a text; a few are decoded to pixels and captioned; latents are cached.
    flops, first = stage.flops, get_recipe("demo").stages[0]
    pairs, photos = (source.fraction for source in get_recipe("demo").data.sources)
    texts = pairs / (pairs + photos) / 2
    pixels, captions = first.pixel_images / first.batch_size, first.caption_images / first.batch_size
    latents = first.latent_images / first.batch_size
    expected = 3 * (flops["encoder"] + latents * flops["decoder"] + texts * flops["text"] + captions * flops["captioner"])
    assert stage.flops_per_sample == pytest.approx(expected + 2 * pixels * flops["vae_decoder"])


def test_large_needs_no_data():
    assert make_plan(get_recipe("large")).parameters["encoder"] > 3e8
