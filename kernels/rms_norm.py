"""RMS normalisation of rows held in registers, with the residual addition before it and the residual's gradient after it.

Forward: one pass; x + residual is rounded first, as in the reference, then normalised. Backward: one pass as well, which computes rstd again from the
row that it holds; each program owns a strip of rows, keeps the weight in registers and writes one partial sum of its gradient, which `merge` adds up.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .lib.common import TYPES, cdiv, rounded
from .lib.config import pick
from .lib.launch import kernel
from .lib.norm import add_configurations, load_sum, size_class
from .lib.reduce import merge, strips_of
from .lib.rows import empty, load_rows, row_arguments, rows

add_configurations("rms_norm")


@kernel
def _rms_norm_forward(
    x, x_inner, x_outer_stride, x_inner_stride, residual, residual_inner, residual_outer_stride, residual_inner_stride,
    weight, y, h, rows, width, eps, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    out = row.to(tl.int64)[:, None] * width + column[None, :]
    value = load_sum(
        x, x_inner, x_outer_stride, x_inner_stride, residual, residual_inner, residual_outer_stride, residual_inner_stride,
        h, out, row, column, mask,
    )  # fmt: skip
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    result = value * scale[:, None] * tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    tl.store(y + out, rounded(result, y.dtype.element_ty), mask=mask)


@kernel
def _rms_norm_backward(
    grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, grad_h, grad_h_inner, grad_h_outer_stride, grad_h_inner_stride,
    h, h_inner, h_outer_stride, h_inner_stride, weight, grad_x, weight_partials, rows, width, rows_per_strip, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    # One accumulator per row of the block: no reduction across threads within the loop.
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        upstream = load_rows(grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, row, column, mask)
        value = load_rows(h, h_inner, h_outer_stride, h_inner_stride, row, column, mask)
        scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
        if weight_partials is not None:
            weight_sum += upstream * (value * scale)
        if grad_x is not None:
            scaled = upstream * factor * scale
            along = tl.sum(scaled * value, 1)[:, None] / width * scale * scale
            result = scaled - value * along
            if grad_h is not None:
                result += load_rows(grad_h, grad_h_inner, grad_h_outer_stride, grad_h_inner_stride, row, column, mask)
            out = row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(grad_x + out, rounded(result, grad_x.dtype.element_ty), mask=mask)
    if weight_partials is not None:
        tl.store(weight_partials + strip.to(tl.int64) * width + column, tl.sum(weight_sum, 0), mask=inside)


def forward(x, weight, residual, eps):
    """x, residual [..., D], any strides; weight [D]. Returns y and h (empty without a residual)."""
    y, h = empty(x, x.shape), empty(x, x.shape, residual is not None)
    if x.numel():
        x_rows, more = rows(x), None if residual is None else rows(residual)
        config = pick("rms_norm_forward", TYPES[x.dtype], size_class(x_rows.width))
        _rms_norm_forward[cdiv(x_rows.count, config.blocks["BLOCK_ROWS"]),](
            *x_rows.arguments, *row_arguments(more), weight.contiguous(), y, None if more is None else h,
            x_rows.count, x_rows.width, float(eps), **config.options,
        )  # fmt: skip
    return y, h


def backward(grad_y, grad_h, h, weight, eps, need_x, need_weight):
    """Gradients of x (the residual's part grad_h added) and weight; an empty tensor where one is not asked for."""
    grad_x, grad_weight = empty(h, h.shape, need_x), empty(weight, weight.shape, need_weight)
    if h.numel() == 0:
        return grad_x, grad_weight.zero_()
    h_rows, upstream, more = rows(h), rows(grad_y), None if grad_h is None else rows(grad_h)
    strips, length = strips_of(h_rows.count)
    partials = empty(h, (1, strips, h_rows.width), need_weight, torch.float32)
    config = pick("rms_norm_backward", TYPES[h.dtype], size_class(h_rows.width))
    _rms_norm_backward[strips,](
        *upstream.arguments, *row_arguments(more), *h_rows.arguments, weight.contiguous(),
        grad_x if need_x else None, partials if need_weight else None, h_rows.count, h_rows.width, length, float(eps), **config.options,
    )  # fmt: skip
    if need_weight:
        merge(partials, grad_weight)
    return grad_x, grad_weight
