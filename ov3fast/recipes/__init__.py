"""Named training runs: `get_recipe("base")`. Each file reads top to bottom and is one Recipe."""

from importlib import import_module

from ov3fast.models.config import LPIPSConfig

from .config import OptimizerConfig, Recipe, Stage
from .edit import SUFFIXES, edit, read_recipe

NAMES = ("demo", "base", "large", "custom")

__all__ = ["NAMES", "LPIPSConfig", "OptimizerConfig", "Recipe", "Stage", "SUFFIXES", "edit", "get_recipe", "read_recipe"]


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. ValueError for another one."""
    if name not in NAMES:
        raise ValueError(f"recipe: name must be one of {', '.join(NAMES)}; got {name!r}")
    recipe: Recipe = import_module(f"ov3fast.recipes.{name}").RECIPE
    return recipe
