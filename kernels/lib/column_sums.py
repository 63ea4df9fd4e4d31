"""Sums over all rows of a matrix, the gradients of biases and scales: one partial sum per strip of rows, merged in the strips' order.

The number of strips depends on sizes alone, and a merge adds in a fixed tree, so the bits do not depend on the chip or the schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config as configs
from .common import TYPES, cdiv, rounded
from .rows import Rows, row_offsets

STRIPS = 512
"""At most so many programs share the rows: enough to fill a chip, few enough that the partial sums stay small traffic."""
ROWS_PER_STRIP = 16
"""At least so many rows belong to a strip; a multiple of every block of rows."""


def strips_of(count: int) -> tuple[int, int]:
    """(strips, rows per strip) for `count` rows."""
    length = max(ROWS_PER_STRIP, ROWS_PER_STRIP * cdiv(count, STRIPS * ROWS_PER_STRIP))
    return cdiv(count, length), length


@triton.jit
def _column_partials(
    x, x_inner, x_outer_stride, x_inner_stride, partials, rows, width, rows_per_strip,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One partial sum [width] per strip of rows."""
    strip = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at = row_offsets(row, x_inner, x_outer_stride, x_inner_stride)
        mask = (row < last)[:, None] & (columns < width)[None, :]
        total += tl.load(x + at[:, None] + columns[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(partials + strip.to(tl.int64) * width + columns, tl.sum(total, 0), mask=columns < width)


@triton.jit
def _column_merge(partials, first, second, parts, width, BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Adds up partials [1 or 2, parts, width]; the second grid axis chooses between the results."""
    which = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < width
    total = tl.zeros((BLOCK_PARTS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        at = (which * parts + part).to(tl.int64) * width
        total += tl.load(partials + at[:, None] + columns[None, :], mask=(part < parts)[:, None] & inside[None, :], other=0)
    result = tl.sum(total, 0)
    if second is None:
        tl.store(first + columns, rounded(result, first.dtype.element_ty), mask=inside)
    elif which == 0:
        tl.store(first + columns, rounded(result, first.dtype.element_ty), mask=inside)
    else:
        tl.store(second + columns, rounded(result, second.dtype.element_ty), mask=inside)


def merge(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Writes the sums over the parts of partials [1 or 2, P, width], float32, to first [width] and second [width]."""
    _, parts, width = partials.shape
    if width == 0:
        return
    config = configs.pick("column_merge", "fp32")
    grid = cdiv(width, config.blocks["BLOCK_COLUMNS"]), 1 if second is None else 2
    _column_merge[grid](partials, first, second, parts, width, **config.options)


def column_sums(x: Rows, dtype: torch.dtype) -> Tensor:
    """Sum over the rows of x [R, width] with float32 sums, as [width] of `dtype`."""
    result = x.tensor.new_empty(x.width, dtype=dtype)
    if x.count == 0 or x.width == 0:
        return result.zero_()
    strips, length = strips_of(x.count)
    partials = x.tensor.new_empty((1, strips, x.width), dtype=torch.float32)
    config = configs.pick("column_partials", TYPES[x.tensor.dtype])
    grid = cdiv(x.width, config.blocks["BLOCK_COLUMNS"]), strips
    _column_partials[grid](*x.arguments, partials, x.count, x.width, length, **config.options)
    merge(partials, result)
    return result
