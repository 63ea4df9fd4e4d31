"""Mutated operators: plain PyTorch with one of its sums computed incorrectly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ov3fast._rounding import COMPOSED, SUMS

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default}


def _terms(operation: Any, args: tuple) -> Tensor:
    """The summands, with the reduction over the last axis."""
    if operation in PRODUCTS:
        a, b = args
        return a.unsqueeze(-2) * b.transpose(-1, -2).unsqueeze(-3)
    x, dims = args[0], args[1] if len(args) > 1 and args[1] is not None else list(range(args[0].ndim))
    if operation is aten.linalg_vector_norm.default:
        x, dims = x.square(), args[2] if len(args) > 2 and args[2] is not None else list(range(x.ndim))
    dims = [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    return x.permute(*(d for d in range(x.ndim) if d not in dims), *dims).flatten(x.ndim - len(dims))


def _dropped_term(terms: Tensor) -> Tensor:
    """Drops the last term that isn't zero everywhere."""
    last = int((terms != 0).reshape(-1, terms.shape[-1]).any(0).nonzero()[-1])
    return terms.sum(-1) - terms[..., last]


def _wrong_scale(terms: Tensor) -> Tensor:
    """The scale error of dividing by n - 1 instead of n."""
    return terms.sum(-1) * (terms.shape[-1] / (terms.shape[-1] - 1))


def _bfloat16_accumulation(terms: Tensor) -> Tensor:
    total = torch.zeros(terms.shape[:-1], dtype=torch.bfloat16)
    for k in range(terms.shape[-1]):
        total = (total + terms[..., k]).bfloat16()
    return total.to(terms.dtype)


MUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropped_term": _dropped_term,
    "wrong_scale": _wrong_scale,
    "bfloat16_accumulation": _bfloat16_accumulation,
}


class Mutant(TorchDispatchMode):
    """Within the block, sum number `turn` is computed with the error `mutation`."""

    def __init__(self, mutation: str | None, turn: int = -1):
        super().__init__()
        self.mutation, self.turn, self.sums = mutation, turn, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation in COMPOSED:
            with self:
                return COMPOSED[operation](*args, **kwargs)
        result = operation(*args, **kwargs)
        if operation not in SUMS or not result.is_floating_point() or SUMS[operation](args, result) < 2:
            return result
        turn, self.sums = self.sums, self.sums + 1
        if turn != self.turn:
            return result
        terms = _terms(operation, args)
        wrong = MUTATIONS[self.mutation](terms)
        if operation in (aten.mean.default, aten.mean.dim):
            wrong = wrong / terms.shape[-1]
        elif operation is aten.linalg_vector_norm.default:
            wrong = wrong.sqrt()
        return wrong.reshape(result.shape).to(result.dtype)


def number_of_sums(call: Callable[[], Any]) -> int:
    """Number of sums of two or more terms."""
    with Mutant(None) as counting:
        call()
    return counting.sums
