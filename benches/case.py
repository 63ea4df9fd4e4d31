"""One row of the operator table: its variants, and wrappers that make a function timeable.

Variants take no arguments: "ov3fast" is ours, the others are peers. Backward passes use torch.autograd.grad, so that no gradients accumulate in the leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIXED = "mixed"
"""bf16 activations with fp32 parameters, as in training under autocast."""
OURS = "ov3fast"


@dataclass
class Case:
    operator: str
    direction: str
    """"forward", "backward" or "both"."""
    size: tuple[int, ...] | None
    """Size as used for the choice of backends; None if the case is not a single operator."""
    shape: str
    dtype: str
    variants: dict[str, Callable[[], object]]
    flops: float = 0.0
    """FLOPs of the matrix products in the call."""
    bytes: float = 0.0
    """Minimum number of bytes read and written."""
    target: float | None = None
    """Target speedup over the best peer."""
    note_memory: bool = False
    result_bytes: float = 0.0
    """Size of outputs and gradients, which do not count as extra memory."""


def randn(*shape: int, dtype: torch.dtype, grad: bool = False, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_(grad)


def both(function: Callable[..., object], *leaves: Tensor) -> Callable[[], object]:
    """Forward and backward of `function`, with gradients of all leaves and random upstream gradients (1 for a scalar)."""

    def run() -> object:
        out = function(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        if run.upstream is None:
            run.upstream = [torch.randn_like(value) if value.ndim else None for value in outputs]
        return torch.autograd.grad(outputs, leaves, run.upstream)

    run.upstream = None
    return run


def storage(dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of activations and of parameters."""
    return (torch.bfloat16, torch.float32) if dtype == MIXED else (DTYPES[dtype], DTYPES[dtype])


def forward(function: Callable[..., object], *arguments: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*arguments)

    return run


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
