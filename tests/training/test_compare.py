import json

import pytest
import torch

from ov3fast.training import checkpoint, train


def test_a_run_with_a_comparison_has_the_bits_of_one_without(tiny, data, tmp_path):
    plain = train(tiny.recipe(data, tmp_path / "plain"))
    compared = train(tiny.recipe(data, tmp_path / "compared", compare_impl="reference", compare_rounds=2))
    assert "comparison" not in plain
    found = compared["comparison"]
    assert found == json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert found["other"] == "reference" and found["rounds"] == 2
    assert found["ratio"] == pytest.approx(found["images_per_s"] / found["other_images_per_s"])
    a, b = (checkpoint.latest(tmp_path / name / "checkpoints").tensors for name in ("plain", "compared"))
    for group in a:
        for name, value in a[group].items():
            assert torch.equal(value, b[group][name]), (group, name)


def test_impl_runs_every_operator_on_one_backend(tiny, data, tmp_path):
    chosen, plain = (train(tiny.recipe(data, tmp_path / str(impl), impl=impl))["loss"] for impl in (None, "reference"))
    assert plain == pytest.approx(chosen, rel=1e-2)


def test_an_unknown_impl_is_named(tiny, data, tmp_path):
    with pytest.raises(ValueError, match="impl must be one of .*; got 'mkl'"):
        train(tiny.recipe(data, tmp_path, impl="mkl"))
