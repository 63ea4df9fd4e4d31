"""recipe.contrastive_exchange reaches the operator."""

import dataclasses

import pytest
import torch

from ov3fast import ops
from ov3fast.losses import Objective, ObjectiveConfig
from ov3fast.training import train


def test_the_recipe_s_exchange_is_the_operator_s(tiny, data, tmp_path, monkeypatch):
    seen, real = set(), ops.contrastive_loss

    def recording(*arguments, **options):
        seen.add(options["exchange"])
        return real(*arguments, **options)

    monkeypatch.setattr(ops, "contrastive_loss", recording)
    recipe = tiny.recipe(data, tmp_path, stages=((1, 32),), contrastive_exchange="ring")
    train(recipe)
    train(dataclasses.replace(recipe, contrastive_exchange="gather", run_dir=tmp_path / "gather"))
    assert seen == {"ring", "gather"}


def test_an_unknown_exchange_is_named():
    objective = Objective(ObjectiveConfig(), exchange="mesh")
    with pytest.raises(ValueError, match="exchange must be one of gather, ring; got 'mesh'"):
        objective.contrastive(torch.ones(2, 4), torch.ones(2, 4), torch.tensor(1.0))
