"""A tensor's leading axes as rows, for any strides: row r is at offset (r // inner) * outer_stride + (r % inner) * inner_stride."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """[..., K] viewed as [R, K] without a copy; K is contiguous."""

    tensor: Tensor
    count: int
    width: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def arguments(self) -> tuple[Tensor, int, int, int]:
        """Kernel arguments: pointer, inner, outer_stride, inner_stride."""
        return self.tensor, self.inner, self.outer_stride, self.inner_stride

    @property
    def has_one_stride(self) -> bool:
        return self.inner == 1

    @property
    def matrix(self) -> Tensor:
        """[R, K]: a view if the rows have one stride, else a copy."""
        if self.tensor.ndim == 2:
            return self.tensor
        if not self.has_one_stride:
            return self.tensor.reshape(self.count, self.width)
        return self.tensor.as_strided((self.count, self.width), (self.outer_stride, 1))


def rows(x: Tensor) -> Rows:
    """x [..., K] as rows. Copies only if the last axis is not contiguous or the leading axes need more than two strides."""
    layout = _layout(x.shape, x.stride())
    if layout is None:
        x = x.contiguous()
        layout = _layout(x.shape, x.stride())
        assert layout is not None
    return Rows(x, *layout)


@functools.lru_cache(4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int, int, int] | None:
    """The remaining fields of Rows, or None if a copy is needed."""
    count, width = math.prod(shape[:-1]), shape[-1]
    if count * width == 0:
        return count, width, 1, width, 0
    if width > 1 and strides[-1] != 1:
        return None
    axes = _merged([(size, step) for size, step in zip(shape[:-1], strides[:-1], strict=True) if size != 1])
    if len(axes) > 2:
        return None
    if len(axes) < 2:
        # A single row has no stride; its width keeps the alignment that the kernel is specialised for.
        return count, width, 1, axes[0][1] if axes else width, 0
    (_, outer_stride), (inner, inner_stride) = axes
    return count, width, inner, outer_stride, inner_stride


def _merged(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of the axes, with mutually contiguous neighbours merged."""
    joined: list[tuple[int, int]] = []
    for size, step in axes:
        if joined and joined[-1][1] == size * step:
            joined[-1] = (joined[-1][0] * size, step)
        else:
            joined.append((size, step))
    return joined


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride):
    """Row offsets, int64. With one stride, `inner` is 1 and the division is compiled away."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def load_rows(x, inner, outer_stride, inner_stride, row, column, mask):
    """x[row, column] in float32, 0 outside the mask."""
    at = row_offsets(row, inner, outer_stride, inner_stride)
    return tl.load(x + at[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)


def row_arguments(x: Rows | None) -> tuple[Tensor | None, int, int, int]:
    """Kernel arguments of rows that may be missing."""
    return (None, 1, 0, 0) if x is None else x.arguments


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes a microsecond even if there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def empty(like: Tensor, shape: Any, needed: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous result, or an empty tensor if it is not needed."""
    if not needed:
        return like.new_empty_strided((0,), (1,), dtype=dtype)
    shape = (shape,) if isinstance(shape, int) else shape
    return like.new_empty_strided(shape, _contiguous_strides(shape), dtype=dtype)  # half of new_empty's time


@functools.lru_cache(4096)
def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
