"""The two-layer MLP, with the activation fused into the epilogues of the products next to it.

Forward: one epilogue rounds h = x W1^T + b1, writes it if there will be a backward, and writes a = gelu(h). Activating h in the second product's prologue
would save writing a, 2 bytes per element, but evaluate it once per tile of D columns. Backward: dh = (dy W2) gelu'(h), a = gelu(h) and partial sums of db1
come from one epilogue. The products without an activation are linear.py's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import linear
from .lib import gemm
from .lib.common import cdiv, rounded
from .lib.config import TABLE
from .lib.gelu import gelu, gelu_and_slope
from .lib.gemm import halves, multiply, product_rows, square, tile_position
from .lib.launch import kernel
from .lib.reduce import column_sums, merge
from .lib.rows import empty, row_offsets, rows

# Size classes: those of gemm.size_class.
TABLE["mlp_forward"] = product_rows(square(32, HALVES=0), square(64, HALVES=0), square(64, HALVES=0), HALVES=0)
# The epilogue holds h, both results and the tile, which spills for a 128 x 128 tile unless it is processed in halves.
TABLE["mlp_backward"] = product_rows(square(32, HALVES=1), square(64, HALVES=1), square(64, HALVES=1), HALVES=0)


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
    return linear.forward(a, w2, b2)


def backward(grad_y, x, h, w1, w2, activation, need_x, need_w1, need_b1, need_w2, need_b2):
    """Gradients of x, w1, b1, w2, b2 (the latter four in w1's dtype); empty tensors for those not needed."""
    upstream, h_rows, hidden, need_h = rows(grad_y), rows(h), w1.shape[0], need_x or need_w1 or need_b1
    grad_h, a = empty(h, (h_rows.count, hidden), need_h), empty(h, (h_rows.count, hidden), need_w2)
    grad_b1 = empty(w1, hidden, need_b1)
    if h.numel() and (need_h or need_w2):
        operand = gemm.operand(w2, upstream)
        config, grid = gemm.configure("mlp_backward", h.dtype, h_rows.count, hidden)
        parts = cdiv(h_rows.count, config.blocks["BLOCK_M"])
        partials = empty(h, (1, parts, hidden), need_b1, torch.float32)
        _mlp_backward[grid](
            *upstream.arguments, operand, operand.stride(0), *h_rows.arguments, grad_h if need_h else None,
            a if need_w2 else None, partials if need_b1 else None, h_rows.count, hidden, upstream.width,
            EXACT=activation == "gelu", **config.options,
        )  # fmt: skip
        if need_b1:
            merge(partials, grad_b1)
    elif need_b1:
        grad_b1.zero_()
    dh = rows(grad_h) if need_h else None
    return (
        linear.input_gradient(dh, w1).view(x.shape) if need_x else empty(x, 0),
        linear.weight_gradient(dh, rows(x), w1.dtype) if need_w1 else empty(w1, 0),
        grad_b1,
        linear.weight_gradient(upstream, rows(a), w1.dtype) if need_w2 else empty(w1, 0),
        column_sums(upstream, w1.dtype) if need_b2 else empty(w1, 0),
    )
