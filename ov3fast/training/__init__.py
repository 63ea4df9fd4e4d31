"""Training: the loop and what it is made of. Names load on first use, so that the import stays light.

train(recipe, resume=False)       run a recipe's stages
dry_run(recipe)                   print what it comes to; make_plan(recipe) returns it
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "train": "ov3fast.training.loop",
    "EXIT_INTERRUPTED": "ov3fast.training.loop",
    "NonFiniteError": "ov3fast.training.guard",
    "SpikeError": "ov3fast.training.guard",
    "dry_run": "ov3fast.training.plan",
    "make_plan": "ov3fast.training.plan",
}

__all__ = ["EXIT_INTERRUPTED", "NonFiniteError", "SpikeError", "dry_run", "make_plan", "train"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ov3fast.training' has no attribute {name!r}")
