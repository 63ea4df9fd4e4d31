"""The folder of a run with one checkpoint: who may go on in it, and what a run that starts over removes."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from ov3fast.training.run_folder import CHECKPOINT, check_run_dir, load_checkpoint, save_checkpoint, start_run


@dataclass(frozen=True)
class Recipe:
    run_dir: Path
    steps: int = 4
    betas: tuple[float, float] = (0.9, 0.95)


def check(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> bool:
    return check_run_dir(recipe, resume=resume, overwrite=overwrite, may_change=("steps",))


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """Of a run that has saved and left a model."""
    recipe = Recipe(tmp_path / "run")
    start_run(recipe, False, "model")
    save_checkpoint(recipe.run_dir / CHECKPOINT, {"weights": {"a/b": torch.arange(3.0)}, "moments": {}}, {"step": 2})
    (recipe.run_dir / "model").mkdir()
    return recipe


def test_a_checkpoint_returns_what_was_saved(recipe):
    groups, progress = load_checkpoint(recipe.run_dir / CHECKPOINT)
    assert groups.keys() == {"weights"} and torch.equal(groups["weights"]["a/b"], torch.arange(3.0))
    assert progress == {"step": 2}


def test_who_may_go_on(recipe, tmp_path):
    assert check(recipe, resume=True) and check(replace(recipe, steps=9), resume=True)
    assert not check(recipe, overwrite=True) and not check(Recipe(tmp_path / "new"), resume=True)
    with pytest.raises(FileExistsError, match="holds a run; --resume continues it, --overwrite starts over"):
        check(recipe)
    with pytest.raises(ValueError, match=r"betas is \[0.5, 0.5\], but .* was started with \[0.9, 0.95\]"):
        check(replace(recipe, betas=(0.5, 0.5)), resume=True)


def test_starting_over_leaves_nothing_to_resume(recipe):
    """Else a run that is killed before its first save would continue from the checkpoint of the run that it replaced."""
    start_run(recipe, True, "model")
    assert check(recipe, resume=True) and (recipe.run_dir / "model").is_dir()
    start_run(recipe, False, "model")
    assert not check(recipe, resume=True) and not (recipe.run_dir / "model").exists()
