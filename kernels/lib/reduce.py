"""Sums over many rows in an order that depends only on the sizes: gradients of biases and scales, and split-K partial products.

Each strip of rows is reduced to one row of float32 partial sums, and the strips are added in a fixed tree, so the bits depend neither on the chip nor on
the order in which programs run.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .common import TYPES, cdiv, rounded
from .config import ANY, TABLE, Config, pick
from .launch import kernel
from .rows import Rows, empty, load_rows, rows

TABLE["column_partials"] = {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256}, warps=4, stages=1)}
TABLE["column_merge"] = {(ANY, ANY, ANY): Config({"BLOCK_PARTS": 128, "BLOCK_COLUMNS": 32}, warps=8, stages=1)}
TABLE["merge_splits"] = {(ANY, ANY, ANY): Config({"BLOCK": 1024}, warps=4, stages=1)}


STRIPS = 512
"""Most strips: enough to fill a chip, few enough to keep the traffic of partial sums small. A constant, independent of the device."""
ROWS_PER_STRIP = 16
"""Minimum number of rows per strip; a multiple of every block of rows."""


def strips_of(count: int, multiple: int = ROWS_PER_STRIP) -> tuple[int, int]:
    """(strips, rows per strip) for `count` rows; in all strips but the last, the number of rows is a multiple of `multiple`."""
    length = multiple * max(1, cdiv(count, STRIPS * multiple))
    return cdiv(count, length), length


@kernel
def _column_partials(
    x, x_inner, x_outer_stride, x_inner_stride, partials, rows, width, rows_per_strip,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One sum [width] per strip of rows: partials [strips, width]. Column blocks of one strip are adjacent in the grid."""
    blocks = tl.cdiv(width, BLOCK_COLUMNS)
    strip = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None] & (columns < width)[None, :]
        total += load_rows(x, x_inner, x_outer_stride, x_inner_stride, row, columns, mask)
    at_strip = strip.to(tl.int64) * width + columns
    tl.store(partials + at_strip, rounded(tl.sum(total, 0), partials.dtype.element_ty), mask=columns < width)


@kernel
def _column_merge(partials, first, second, parts, width, BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Adds up partials [1 or 2, parts, width]; the second grid axis selects the result."""
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


@kernel
def merge_splits(partials, out, n, splits, BLOCK: tl.constexpr):
    """out [n] = sum over splits of partials [splits, n]: few summands, many sums."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partials + i, mask=i < n, other=0.0)
        partials += n
    tl.store(out + i, rounded(total, out.dtype.element_ty), mask=i < n)


def column_sums(x: Rows, dtype: torch.dtype) -> Tensor:
    """Sum over the rows of x [R, width], accumulated in float32, as [width] of `dtype`."""
    result = empty(x.tensor, x.width, dtype=dtype)
    if x.count == 0 or x.width == 0:
        return result.zero_()
    strips, length = strips_of(x.count)
    partials = result if strips == 1 else empty(x.tensor, (strips, x.width), dtype=torch.float32)
    _sum_strips(x, partials, strips, length)
    if strips > 1:
        merge(partials[None], result)
    return result


def sum_batches(x_BND: Tensor) -> Tensor:
    """[N, D] in float32: the sum over the first axis."""
    batch, tokens, width = x_BND.shape
    result = x_BND.new_empty((tokens, width), dtype=torch.float32)
    _sum_strips(rows(x_BND.transpose(0, 1)), result, tokens, batch)
    return result


def _sum_strips(x: Rows, partials: Tensor, strips: int, length: int) -> None:
    config = pick("column_partials", TYPES[x.tensor.dtype])
    grid = (strips * cdiv(x.width, config.blocks["BLOCK_COLUMNS"]),)
    _column_partials[grid](*x.arguments, partials, x.count, x.width, length, **config.options)


def merge(partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Writes the sums over the parts of partials [1 or 2, P, width], float32, to first [width] and second [width]."""
    _, parts, width = partials.shape
    if width == 0:
        return
    config = pick("column_merge", "fp32")
    grid = cdiv(width, config.blocks["BLOCK_COLUMNS"]), 1 if second is None else 2
    _column_merge[grid](partials, first, second, parts, width, **config.options)


def splits_of(rows: int, block: int, tiles: int, programs: int = 256) -> tuple[int, int]:
    """How to split the sum over `rows` in each of `tiles` output tiles to get about `programs` programs: number of splits, rows per split."""
    steps = cdiv(rows, block)
    wanted = max(1, min(cdiv(programs, tiles), steps // 4))
    split_steps = cdiv(steps, wanted)
    return cdiv(steps, split_steps), split_steps * block


def sum_splits(partials: Tensor, out: Tensor) -> None:
    """out = sum of partials [splits, *out.shape], float32, over splits."""
    config = pick("merge_splits", TYPES[out.dtype])
    grid = (cdiv(out.numel(), config.blocks["BLOCK"]),)
    merge_splits[grid](partials, out, out.numel(), partials.shape[0], **config.options)
