"""The two-layer MLP, with the activation fused into the epilogues of the products next to it.

Forward: one epilogue rounds h = x W1^T + b1, writes it if there will be a backward, and writes a = gelu(h). Activating h in the second product's prologue
would save writing a, 2 bytes per element, but evaluate it once per tile of D columns. Backward: dh = (dy W2) gelu'(h), a = gelu(h) and partial sums of db1
come from one epilogue. The products without an activation are linear.py's: cuBLAS's, but for small training steps, which end before a host has started
five kernels of cuBLAS and the sums for the biases. Those take two launches in each direction: the second is linear.py's tiled product, or one that
computes dx, dW1, dW2, db1 and db2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import linear
from .lib import gemm
from .lib.common import TYPES, cdiv, rounded
from .lib.config import TABLE, pick
from .lib.gelu import gelu, gelu_and_slope
from .lib.gemm import gradient_rows, halves, input_tile, multiply, product_rows, square, tile_position, weight_tile
from .lib.launch import kernel
from .lib.reduce import column_sums, merge
from .lib.rows import Rows, empty, row_offsets, rows

# Size classes: those of gemm.size_class.
TABLE["mlp_forward"] = product_rows(square(32, HALVES=0), square(64, HALVES=0), square(64, HALVES=0), HALVES=0)
# The epilogue holds h, both results and the tile, which spills for a 128 x 128 tile unless it is processed in halves.
TABLE["mlp_backward"] = product_rows(square(32, HALVES=1), square(64, HALVES=1), square(64, HALVES=1), HALVES=0)
TABLE["mlp_gradients"] = gradient_rows()


@triton.jit
def _forward_epilogue(total, row, column, b1, h, a, rows, hidden, EXACT: tl.constexpr):
    if b1 is not None:
        total += tl.load(b1 + column, mask=column < hidden, other=0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * hidden + column[None, :]
    mask = (row < rows)[:, None] & (column < hidden)[None, :]
    dtype: tl.constexpr = a.dtype.element_ty
    kept = rounded(total, dtype)
    if h is not None:
        tl.store(h + at, kept, mask=mask)
    # The backward recomputes a from the rounded h and must get the same bits.
    tl.store(a + at, rounded(gelu(kept.to(tl.float32), EXACT, dtype != tl.float32), dtype), mask=mask)


@kernel
def _mlp_forward(
    x, x_inner, x_outer_stride, x_inner_stride, w1, w1_stride, b1, h, a, rows, hidden, width,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(tl.cdiv(rows, BLOCK_M), tl.cdiv(hidden, BLOCK_N), GROUP)
    row, column = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = row_offsets(tl.minimum(row, rows - 1), x_inner, x_outer_stride, x_inner_stride)
    total = multiply(x, x_at, w1, w1_stride, tl.minimum(column, hidden - 1), hidden, width, True, BLOCK_M, BLOCK_N, BLOCK_K)
    if HALVES:
        half: tl.constexpr = BLOCK_N // 2
        left, right = halves(total)
        column = n * BLOCK_N + tl.arange(0, half)
        _forward_epilogue(left, row, column, b1, h, a, rows, hidden, EXACT)
        _forward_epilogue(right, row, column + half, b1, h, a, rows, hidden, EXACT)
    else:
        _forward_epilogue(total, row, column, b1, h, a, rows, hidden, EXACT)


@triton.jit
def _backward_epilogue(
    total, m, row, column, h, h_at, grad_h, a, b1_partials, rows, hidden, EXACT: tl.constexpr
):  # fmt: skip
    mask = (row < rows)[:, None] & (column < hidden)[None, :]
    at = row.to(tl.int64)[:, None] * hidden + column[None, :]
    narrow: tl.constexpr = h.dtype.element_ty != tl.float32
    values = tl.load(h + h_at[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    activated, slope = gelu_and_slope(values, EXACT, narrow)
    if a is not None:
        tl.store(a + at, rounded(activated, a.dtype.element_ty), mask=mask)
    if grad_h is not None:
        total *= slope
        tl.store(grad_h + at, rounded(total, grad_h.dtype.element_ty), mask=mask)
        if b1_partials is not None:
            column_sum = tl.sum(tl.where((row < rows)[:, None], total, 0), 0)
            tl.store(b1_partials + m.to(tl.int64) * hidden + column, column_sum, mask=column < hidden)


@kernel
def _mlp_backward(
    grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, w2, w2_stride, h, h_inner, h_outer_stride, h_inner_stride,
    grad_h, a, b1_partials, rows, hidden, features,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    m, n = tile_position(tl.cdiv(rows, BLOCK_M), tl.cdiv(hidden, BLOCK_N), GROUP)
    row, column = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    existing = tl.minimum(row, rows - 1)
    if grad_h is not None:
        grad_at = row_offsets(existing, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride)
        total = multiply(grad_y, grad_at, w2, w2_stride, column, hidden, features, False, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_at = row_offsets(existing, h_inner, h_outer_stride, h_inner_stride)
    if HALVES:
        half: tl.constexpr = BLOCK_N // 2
        left, right = halves(total)
        column = n * BLOCK_N + tl.arange(0, half)
        _backward_epilogue(left, m, row, column, h, h_at, grad_h, a, b1_partials, rows, hidden, EXACT)
        _backward_epilogue(right, m, row, column + half, h, h_at, grad_h, a, b1_partials, rows, hidden, EXACT)
    else:
        _backward_epilogue(total, m, row, column, h, h_at, grad_h, a, b1_partials, rows, hidden, EXACT)


@kernel
def _mlp_gradients(
    grad_h, a, grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, x, x_inner, x_outer_stride, x_inner_stride, w1, w1_stride,
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2, rows, width, hidden, features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dx, dW1 or dW2 per program, those with the longest sums first; None for what is not needed."""
    tile, across = tl.program_id(0), tl.cdiv(width, BLOCK_N)
    of_x = tl.cdiv(rows, BLOCK_M) * across if grad_x is not None else 0
    of_w1 = tl.cdiv(hidden, BLOCK_M) * across if grad_w1 is not None or grad_b1 is not None else 0
    if grad_x is not None and tile < of_x:
        input_tile(grad_h, 1, hidden, 0, w1, w1_stride, grad_x, tile, rows, hidden, width, BLOCK_M, BLOCK_N, BLOCK_K)
    elif (grad_w1 is not None or grad_b1 is not None) and tile < of_x + of_w1:
        weight_tile(
            grad_h, 1, hidden, 0, x, x_inner, x_outer_stride, x_inner_stride, grad_w1, grad_b1,
            tile - of_x, rows, hidden, width, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif grad_w2 is not None or grad_b2 is not None:
        weight_tile(
            grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, a, 1, hidden, 0, grad_w2, grad_b2,
            tile - of_x - of_w1, rows, features, hidden, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def is_small(x: Rows, hidden: int, features: int) -> bool:
    """Whether the products without an activation are ours."""
    return gemm.is_small(x.tensor.dtype, 6 * x.count * hidden * (x.width + features), x.count, x.width, hidden, features)


def forward(x, w1, b1, w2, b2, activation):
    """x [..., K], w1 [H, K], w2 [D, H] -> y [..., D], h [..., H]."""
    h = empty(x, (*x.shape[:-1], w1.shape[0]))
    return _forward(x, w1, b1, w2, b2, activation, h), h


def inference(x, w1, b1, w2, b2, activation):
    """`forward` if nothing needs a gradient: h is empty."""
    return _forward(x, w1, b1, w2, b2, activation, None), x.new_empty(0)


def _forward(x, w1, b1, w2, b2, activation, h):
    x_rows, hidden = rows(x), w1.shape[0]
    a = empty(x, (*x.shape[:-1], hidden))
    if a.numel():
        operand = gemm.operand(w1, x_rows)
        config, grid = gemm.configure("mlp_forward", x.dtype, x_rows.count, hidden)
        _mlp_forward[grid](
            *x_rows.arguments, operand, operand.stride(0), None if b1 is None else b1.contiguous(), h, a,
            x_rows.count, hidden, x_rows.width, EXACT=activation == "gelu", **config.options,
        )  # fmt: skip
    return (linear.tiled if is_small(x_rows, hidden, w2.shape[0]) else linear.large)(a, w2, b2)


def backward(grad_y, x, h, w1, w2, activation, need_x, need_w1, need_b1, need_w2, need_b2):
    """Gradients of x, w1, b1, w2, b2 (the latter four in w1's dtype); empty tensors for those not needed."""
    upstream, h_rows, hidden, need_h = rows(grad_y), rows(h), w1.shape[0], need_x or need_w1 or need_b1
    grad_h, a = empty(h, (h_rows.count, hidden), need_h), empty(h, (h_rows.count, hidden), need_w2)
    grad_b1, x_rows = empty(w1, hidden, need_b1), rows(x)
    small = is_small(x_rows, hidden, upstream.width)
    if h.numel() and (need_h or need_w2):
        operand = gemm.operand(w2, upstream)
        config, grid = gemm.configure("mlp_backward", h.dtype, h_rows.count, hidden)
        parts = cdiv(h_rows.count, config.blocks["BLOCK_M"])
        partials = empty(h, (1, parts, hidden), dtype=torch.float32) if need_b1 and not small else None
        _mlp_backward[grid](
            *upstream.arguments, operand, operand.stride(0), *h_rows.arguments, grad_h if need_h else None,
            a if need_w2 else None, partials, h_rows.count, hidden, upstream.width, EXACT=activation == "gelu", **config.options,
        )  # fmt: skip
        if partials is not None:
            merge(partials, grad_b1)
    elif need_b1:
        grad_b1.zero_()
    if small:
        return _small_gradients(upstream, x_rows, w1, w2, grad_h, a, grad_b1, need_x, need_w1, need_b1, need_w2, need_b2)
    dh = rows(grad_h) if need_h else None
    return (
        linear.input_gradient(dh, w1).view(x.shape) if need_x else empty(x, 0),
        linear.weight_gradient(dh, x_rows, w1.dtype) if need_w1 else empty(w1, 0),
        grad_b1,
        linear.weight_gradient(upstream, rows(a), w1.dtype) if need_w2 else empty(w1, 0),
        column_sums(upstream, w1.dtype) if need_b2 else empty(w1, 0),
    )


def _small_gradients(upstream, x, w1, w2, grad_h, a, grad_b1, need_x, need_w1, need_b1, need_w2, need_b2):
    """The end of a small call's backward: the gradients that need sums over tiles, in one launch."""
    hidden, needs = w1.shape[0], (need_x, need_w1, need_b1, need_w2, need_b2)
    grads = (
        empty(x.tensor, x.tensor.shape, need_x), empty(w1, w1.shape, need_w1), grad_b1, empty(w1, w2.shape, need_w2),
        empty(w1, upstream.width, need_b2),
    )  # fmt: skip
    operand, config = gemm.operand(w1, x), pick("mlp_gradients", TYPES[x.tensor.dtype])
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    across = cdiv(x.width, block_n)
    tiles = (
        need_x * cdiv(x.count, block_m) * across + (need_w1 or need_b1) * cdiv(hidden, block_m) * across
        + (need_w2 or need_b2) * cdiv(upstream.width, block_m) * cdiv(hidden, block_n)
    )  # fmt: skip
    _mlp_gradients[(tiles,)](
        grad_h, a, *upstream.arguments, *x.arguments, operand, operand.stride(0),
        *(grad if need else None for grad, need in zip(grads, needs, strict=True)),
        x.count, x.width, hidden, upstream.width, **config.options,
    )  # fmt: skip
    return grads
