import math

import pytest

from ov3fast.recipes import Stage
from ov3fast.training.schedule import schedule


def stage(**changes):
    return Stage(**{"name": "s", "image_size": 64, "batch_size": 512, "base_lr": 1e-3, **changes})


def test_rates_follow_the_formula():
    times = schedule(stage(steps=100, warmup_steps=10, lr_rule="absolute"), min_lr=1e-5)
    assert [times.lr(step) for step in range(10)] == pytest.approx([1e-3 * (step + 1) / 10 for step in range(10)])
    for step in (10, 37, 55, 99):
        t = (step - 10) / 90
        assert times.lr(step) == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * t)) / 2)
    assert times.lr(10) == pytest.approx(1e-3)
    assert times.lr(100) == pytest.approx(1e-5)
    assert not times.finished(99, 0) and times.finished(100, 0)


def test_base_rate_is_scaled_by_the_batch():
    assert schedule(stage(steps=5)).peak_lr == pytest.approx(2e-3)


def test_epochs_become_steps():
    times = schedule(stage(epochs=3, samples_per_epoch=1000, warmup_epochs=1))
    assert (times.steps, times.warmup_steps) == (6, 2)
    assert schedule(stage(steps=50, warmup_fraction=0.1)).warmup_steps == 5


def test_minutes_follow_the_clock():
    times = schedule(stage(minutes=10, warmup_fraction=0.1, lr_rule="absolute"))
    assert times.lr(0, 0.0) == 0.0
    assert times.lr(7, 0.5) == pytest.approx(5e-4)
    assert times.lr(7, 1.0) == pytest.approx(1e-3)
    assert times.lr(7, 5.5) == pytest.approx(5e-4)
    assert times.lr(7, 11.0) == pytest.approx(0.0)
    assert times.progress(7, 2.5) == 0.25
    assert not times.finished(10**6, 9.99) and times.finished(0, 10.0)
    by_steps = schedule(stage(minutes=10, warmup_steps=4, lr_rule="absolute"))
    assert by_steps.lr(0, 0.0) == pytest.approx(2.5e-4)
    assert by_steps.lr(3, 5.0) == pytest.approx(5e-4)


def test_a_warmup_longer_than_the_stage_is_refused():
    with pytest.raises(ValueError, match="warm-up of 9 steps is longer than its 5 steps"):
        schedule(stage(steps=5, warmup_steps=9))
