"""ov3fast: OpenVision 3 (arXiv 2601.15369) for training, inference and evaluation on fused kernels.

    from ov3fast import OpenVision3, load_vision_encoder, ops

Names load on first use, so that `import ov3fast` costs little more than `import torch`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "OpenVision3": "ov3fast.models.openvision3",
    "load_vision_encoder": "ov3fast.models.vision_tower",
    "optimize": "ov3fast.inference.optimize",
    "preprocess": "ov3fast.data.preprocess",
}
_MODULES = ("ops", "models", "losses", "data", "recipes", "training", "evaluation", "inference", "testing")

__all__ = ["OpenVision3", "__version__", "load_vision_encoder", "ops", "optimize", "preprocess"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return import_module(f"ov3fast.{name}")
    raise AttributeError(f"module 'ov3fast' has no attribute {name!r}")
