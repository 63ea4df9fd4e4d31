"""Sums over many rows in an order that sizes alone decide: bias gradients, and partial products of a split axis.

A strip of rows becomes one row of float32 partial sums; the same kernel then adds the strips up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import TYPES, cdiv, rounded
from .config import pick

# Strips of a sum over rows: enough to fill a large chip with a few blocks of columns each. Not read from the device, so that results are
# the same on all.
STRIPS = 256


@triton.jit
def column_sums(
    x, stride_b, stride_n, out, tokens, width, rows, strip_rows, strip_step, row_step, blocks,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[s] = sum of rows s strip_step + i row_step, i < strip_rows, of x [B, tokens, width] counted through; those >= rows are left out."""
    program = tl.program_id(0)
    strip, block = program // blocks, program % blocks
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, strip_rows, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        row = strip * strip_step + i * row_step
        offsets = (row // tokens).to(tl.int64) * stride_b + (row % tokens).to(tl.int64) * stride_n
        mask = ((i < strip_rows) & (row < rows))[:, None] & (d < width)[None, :]
        total += tl.load(x + offsets[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    at = out + strip.to(tl.int64) * width + d
    tl.store(at, rounded(tl.sum(total, 0), out.dtype.element_ty), mask=d < width)


@triton.jit
def merge_splits(partials, out, n, splits, BLOCK: tl.constexpr):
    """out [n] = sum over splits of partials [splits, n]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partials + i, mask=i < n, other=0.0)
        partials += n
    tl.store(out + i, rounded(total, out.dtype.element_ty), mask=i < n)


def sum_rows(x_BND, out):
    """out [D] = sum of x [B, N, D] over B and N, in two steps; the last axis of x is contiguous."""
    batch, tokens, width = x_BND.shape
    rows = batch * tokens
    if rows * width == 0:
        return out.zero_()
    config = pick("column_sums", TYPES[x_BND.dtype])
    strip_rows = max(1, cdiv(cdiv(rows, STRIPS), config.blocks["BLOCK_R"])) * config.blocks["BLOCK_R"]
    strips, blocks = cdiv(rows, strip_rows), cdiv(width, config.blocks["BLOCK_D"])
    partials = out if strips == 1 else torch.empty(strips, width, dtype=torch.float32, device=x_BND.device)
    column_sums[(strips * blocks,)](
        x_BND,
        x_BND.stride(0),
        x_BND.stride(1),
        partials,
        tokens,
        width,
        rows,
        strip_rows,
        strip_rows,
        1,
        blocks,
        **config.options,
    )
    return out if strips == 1 else sum_of_few(partials, out)


def sum_of_few(rows_RD, out):
    """out [D] = sum of some hundred rows, contiguous [R, D]."""
    count, width = rows_RD.shape
    config = pick("column_sums", TYPES[rows_RD.dtype])
    blocks = cdiv(width, config.blocks["BLOCK_D"])
    column_sums[(blocks,)](rows_RD, 0, width, out, count, width, count, count, 0, 1, blocks, **config.options)
    return out


def sum_batches(x_BND, out_ND):
    """out [N, D] = sum of x [B, N, D] over B."""
    batch, tokens, width = x_BND.shape
    config = pick("column_sums", TYPES[x_BND.dtype])
    blocks = cdiv(width, config.blocks["BLOCK_D"])
    column_sums[(tokens * blocks,)](
        x_BND,
        x_BND.stride(0),
        x_BND.stride(1),
        out_ND,
        tokens,
        width,
        batch * tokens,
        batch,
        1,
        tokens,
        blocks,
        **config.options,
    )
    return out_ND


def splits_of(rows: int, block: int, tiles: int, programs: int = 256) -> tuple[int, int]:
    """How a sum over `rows` in each of `tiles` output tiles is split to keep `programs` busy: splits, and rows of each."""
    steps = cdiv(rows, block)
    wanted = max(1, min(cdiv(programs, tiles), steps // 4))
    split_steps = cdiv(steps, wanted)
    return cdiv(steps, split_steps), split_steps * block


def merged(partials, out):
    """out = sum of partials [splits, *out.shape] over splits."""
    config = pick("merge_splits", TYPES[out.dtype])
    grid = (cdiv(out.numel(), config.blocks["BLOCK"]),)
    merge_splits[grid](partials, out, out.numel(), partials.shape[0], **config.options)
    return out
