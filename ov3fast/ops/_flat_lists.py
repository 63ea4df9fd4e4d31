"""Lists of tensors as multi-tensor kernels read them: dense, with the same memory order in every list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(lists: Sequence[Sequence[Tensor]], changed: int) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The lists with each tensor dense and in the same order as its partners in the other lists.

    Tensors whose layouts differ or have gaps are replaced by contiguous copies. The second result lists the (tensor, copy) pairs of the
    first `changed` lists, to be copied back.
    """
    flat, copies = [list(values) for values in lists], []
    for i, tensors in enumerate(zip(*flat, strict=True)):
        if all(t.is_contiguous() for t in tensors) or _alike_and_dense(tensors):
            continue
        for number, tensor in enumerate(tensors):
            flat[number][i] = copy = tensor.contiguous()
            if number < changed and copy is not tensor:
                copies.append((tensor, copy))
    return flat, copies


def dtype_obstacle(params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Tensor]) -> str | None:
    """Why a kernel with float32 states and gradients of their parameter's dtype or float32 can't take these, or None."""
    if any(t.dtype != torch.float32 for t in states):
        return "it takes states of float32 only"
    if any(g.dtype not in (p.dtype, torch.float32) for p, g in zip(params, grads, strict=True)):
        return "it takes gradients of their parameter's dtype or float32"
    return None


def _alike_and_dense(tensors: Sequence[Tensor]) -> bool:
    """Whether all have the same strides and no gaps, so that equal offsets in memory are equal elements."""
    first = tensors[0]
    expected = 1
    for size, stride in sorted(zip(first.shape, first.stride(), strict=True), key=lambda axis: axis[1]):
        if stride != expected and size != 1:
            return False
        expected *= size
    return all(t.stride() == first.stride() for t in tensors)
