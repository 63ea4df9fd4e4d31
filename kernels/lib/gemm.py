"""The tiled matrix product: tile order, the loop over K, configurations, and when cuBLAS (hipBLASLt) is better.

The kernels of linear.py and mlp.py add their epilogues to it. Small calls' gradients are tiles of one launch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TYPES, cdiv, dot, rounded
from .config import ANY, ARCHITECTURES, Config, Key, pick
from .rows import Rows, load_rows, row_offsets


@triton.jit
def tile_position(tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of this program's tile, ordered in columns of GROUP tiles, so that concurrent programs share operands in L2."""
    tile = tl.program_id(0)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % height, within // height


@triton.jit
def multiply(
    a, a_at, b, b_stride, column, columns, depth,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A float32 tile of a b. Rows of a start at offsets a_at [BLOCK_M]; b is [depth, columns] or, if TRANSPOSED, stored as [columns, depth].

    b is rounded to a's dtype as it is loaded, so that float32 parameters need no copy. Rows of a, and of a transposed b, must exist: instead of
    masking, the caller repeats the last one.
    """
    k = tl.arange(0, BLOCK_K)
    a_tile = a + a_at[:, None] + k[None, :]
    if TRANSPOSED:
        b_tile = b + (column.to(tl.int64) * b_stride)[None, :] + k[:, None]
    else:
        b_tile = b + (k.to(tl.int64) * b_stride)[:, None] + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = depth - start
        x = tl.load(a_tile, mask=(k < left)[None, :], other=0)
        if TRANSPOSED:
            w = tl.load(b_tile, mask=(k < left)[:, None], other=0)
            b_tile += BLOCK_K
        else:
            w = tl.load(b_tile, mask=(k < left)[:, None] & (column < columns)[None, :], other=0)
            b_tile += tl.full((), BLOCK_K, tl.int64) * b_stride
        a_tile += BLOCK_K
        if w.dtype != x.dtype:
            w = rounded(w, x.dtype)
        total = dot(x, w, total)
    return total


@triton.jit
def input_tile(
    grad, grad_inner, grad_outer_stride, grad_inner_stride, weight, weight_stride, grad_x, tile, rows, features, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of grad weight [rows, width]; weight [features, width]."""
    across = tl.cdiv(width, BLOCK_N)
    row, column = tile // across * BLOCK_M + tl.arange(0, BLOCK_M), tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_at = row_offsets(tl.minimum(row, rows - 1), grad_inner, grad_outer_stride, grad_inner_stride)
    total = multiply(grad, grad_at, weight, weight_stride, column, width, features, False, BLOCK_M, BLOCK_N, BLOCK_K)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(grad_x + at, rounded(total, grad_x.dtype.element_ty), mask=(row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def weight_tile(
    grad, grad_inner, grad_outer_stride, grad_inner_stride, x, x_inner, x_outer_stride, x_inner_stride, grad_weight, grad_bias,
    tile, rows, features, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of grad^T x [features, width]; those of the first column also sum grad over the rows."""
    across = tl.cdiv(width, BLOCK_N)
    feature, column = tile // across * BLOCK_M + tl.arange(0, BLOCK_M), tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    if grad_weight is not None:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, rows, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            grad_at = row_offsets(row, grad_inner, grad_outer_stride, grad_inner_stride)
            x_at = row_offsets(row, x_inner, x_outer_stride, x_inner_stride)
            g = tl.load(
                grad + grad_at[None, :] + feature[:, None], mask=(row < rows)[None, :] & (feature < features)[:, None], other=0
            )
            v = tl.load(x + x_at[:, None] + column[None, :], mask=(row < rows)[:, None] & (column < width)[None, :], other=0)
            if v.dtype != g.dtype:
                v = rounded(v, g.dtype)
            total = dot(g, v, total)
        at = feature.to(tl.int64)[:, None] * width + column[None, :]
        mask = (feature < features)[:, None] & (column < width)[None, :]
        tl.store(grad_weight + at, rounded(total, grad_weight.dtype.element_ty), mask=mask)
    if grad_bias is not None and tile % across == 0:
        sums = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for start in range(0, rows, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            inside = (row < rows)[:, None] & (feature < features)[None, :]
            sums += load_rows(grad, grad_inner, grad_outer_stride, grad_inner_stride, row, feature, inside)
        tl.store(grad_bias + feature, rounded(tl.sum(sums, 0), grad_bias.dtype.element_ty), mask=feature < features)


@triton.jit
def halves(total):
    """Left and right half of a tile's columns: an epilogue that processes them in turn needs half the registers."""
    parts = tl.reshape(total, (total.shape[0], 2, total.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


def size_class(rows: int, columns: int) -> str:
    """Size class: "small" if tiles of 128 x 128 would leave most of a chip idle, else "large"."""
    return "small" if cdiv(rows, 128) * cdiv(columns, 128) < 128 else "large"


def product_rows(large: Config, hopper: Config, blackwell: Config, **more: int) -> dict[Key, Config]:
    """Configurations of a tiled product. float32 uses three TF32 products, which fill the registers even with small tiles; MI300 has 64 KiB of shared memory."""
    narrow = {"BLOCK_M": 64, "BLOCK_N": 64, "GROUP": 8, **more}
    return {
        (ANY, "large", ANY): large,
        (ANY, "large", "sm_90"): hopper,
        (ANY, "large", "sm_100"): blackwell,
        (ANY, "large", "gfx942"): replace(large, stages=2),
        (ANY, "small", ANY): Config({**narrow, "BLOCK_K": 64}, warps=4, stages=3),
        **{
            ("fp32", size, a): Config({**narrow, "BLOCK_K": 32}, warps=4, stages=3)
            for size in ("large", "small")
            for a in ARCHITECTURES
        },
    }


def square(depth: int, **more: int) -> Config:
    return Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": depth, "GROUP": 8, **more}, warps=8, stages=4)


def configure(kernel: str, dtype: torch.dtype, rows: int, columns: int) -> tuple[Config, tuple[int]]:
    """The kernel's configuration for a result [rows, columns], and its grid."""
    config = pick(kernel, TYPES[dtype], size_class(rows, columns))
    return config, (cdiv(rows, config.blocks["BLOCK_M"]) * cdiv(columns, config.blocks["BLOCK_N"]),)


FEW_ROWS = 1024
"""Up to this many rows, reading float32 parameters directly costs less than rounding them in a separate pass."""


def cublas_is_better(x: Rows, weight: Tensor) -> bool:
    """Whether a product without a fused epilogue goes to cuBLAS (hipBLASLt).

    Our kernel handles what cuBLAS would need a copy for: rows with two strides, and float32 parameters with a few 16-bit rows. With many rows,
    rounding the parameters once is cheaper than converting their tiles in every program.
    """
    return x.has_one_stride and (weight.dtype == x.tensor.dtype or x.count > FEW_ROWS)


def operand(weight: Tensor, x: Rows) -> Tensor:
    """The weight as our kernels read it: rows with one stride, rounded to x's dtype first if that is cheaper."""
    if weight.dtype != x.tensor.dtype and x.count > FEW_ROWS:
        return weight.to(x.tensor.dtype, memory_format=torch.contiguous_format)
    return weight if weight.stride(-1) == 1 else weight.contiguous()


LONGEST = 2048
"""The most rows or features that one program of a small call sums over: beyond, cuBLAS would split the sum."""
MOST_FLOPS = {torch.float32: 5e8, torch.bfloat16: 4e9, torch.float16: 4e9}
"""Of a small call's forward and backward: some 25 us of an A100's time with tiles of 64 x 64, half of what a host takes to start them."""


def is_small(dtype: torch.dtype, flops: float, *sizes: int) -> bool:
    """Whether starting a call's products, forward and backward, takes a host longer than a GPU takes for them, so that ours come in fewer launches.

    flops: those of the products; sizes: of all their axes.
    """
    return 0 < min(sizes) and max(sizes) <= LONGEST and flops <= MOST_FLOPS[dtype]


def gradient_rows() -> dict[Key, Config]:
    """Configurations of kernels whose programs each compute a tile by `input_tile` or `weight_tile`."""
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64}
    return {
        (ANY, ANY, ANY): Config({**blocks, "BLOCK_K": 64}, warps=4, stages=3),
        (ANY, ANY, "sm_100"): Config({**blocks, "BLOCK_K": 64}, warps=8, stages=3),
        ("fp32", ANY, ANY): Config({**blocks, "BLOCK_K": 32}, warps=4, stages=3),
    }
