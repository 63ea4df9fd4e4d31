"""Layer normalisation of rows in registers, fused with the residual addition before it and the residual's gradient after it.

Forward: one pass; x + residual is rounded first, as in the reference, then normalised. Backward: also one pass; each program owns a strip of rows,
keeps the weight in registers and writes one partial sum of each parameter's gradient, which `merge` adds up.
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

add_configurations("layer_norm")


@kernel
def _layer_norm_forward(
    x, x_inner, x_outer_stride, x_inner_stride, residual, residual_inner, residual_outer_stride, residual_inner_stride,
    weight, bias, y, h, mean, rstd, rows, width, eps, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside, valid = column < width, row < rows
    mask = valid[:, None] & inside[None, :]
    out = row.to(tl.int64)[:, None] * width + column[None, :]
    value = load_sum(
        x, x_inner, x_outer_stride, x_inner_stride, residual, residual_inner, residual_outer_stride, residual_inner_stride,
        h, out, row, column, mask,
    )  # fmt: skip

    centre = tl.sum(value, 1) / width
    centred = tl.where(inside[None, :], value - centre[:, None], 0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(mean + row, centre, mask=valid)
    tl.store(rstd + row, scale, mask=valid)
    result = centred * scale[:, None] * tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=inside, other=0).to(tl.float32)[None, :]
    tl.store(y + out, rounded(result, y.dtype.element_ty), mask=mask)


@kernel
def _layer_norm_backward(
    grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, grad_h, grad_h_inner, grad_h_outer_stride, grad_h_inner_stride,
    h, h_inner, h_outer_stride, h_inner_stride, weight, mean, rstd, grad_x, weight_partials, bias_partials,
    rows, width, rows_per_strip, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    # One accumulator per row of the block, to avoid reductions across threads within the loop.
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        valid = row < last
        mask = valid[:, None] & inside[None, :]
        upstream = load_rows(grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, row, column, mask)
        value = load_rows(h, h_inner, h_outer_stride, h_inner_stride, row, column, mask)
        r = tl.load(rstd + row, mask=valid, other=0)[:, None]
        normal = (value - tl.load(mean + row, mask=valid, other=0)[:, None]) * r
        if weight_partials is not None:
            weight_sum += upstream * normal
        if bias_partials is not None:
            bias_sum += upstream
        if grad_x is not None:
            scaled = upstream * scale
            along = tl.sum(scaled * normal, 1) / width
            shift = tl.sum(scaled, 1) / width
            result = (scaled - (normal * along[:, None] + shift[:, None])) * r
            if grad_h is not None:
                result += load_rows(grad_h, grad_h_inner, grad_h_outer_stride, grad_h_inner_stride, row, column, mask)
            out = row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(grad_x + out, rounded(result, grad_x.dtype.element_ty), mask=mask)
    at_strip = strip.to(tl.int64) * width + column
    if weight_partials is not None:
        tl.store(weight_partials + at_strip, tl.sum(weight_sum, 0), mask=inside)
    if bias_partials is not None:
        tl.store(bias_partials + at_strip, tl.sum(bias_sum, 0), mask=inside)


def forward(x, weight, bias, residual, eps):
    """x, residual [..., D], any strides; weight, bias [D]. Returns y, h (empty without a residual), mean, rstd."""
    y, h = empty(x, x.shape), empty(x, x.shape, residual is not None)
    mean = empty(x, x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        x_rows, more = rows(x), None if residual is None else rows(residual)
        config = pick("layer_norm_forward", TYPES[x.dtype], size_class(x_rows.width))
        _layer_norm_forward[cdiv(x_rows.count, config.blocks["BLOCK_ROWS"]),](
            *x_rows.arguments, *row_arguments(more),
            weight.contiguous(), None if bias is None else bias.contiguous(), y, None if more is None else h, mean, rstd,
            x_rows.count, x_rows.width, float(eps), **config.options,
        )  # fmt: skip
    return y, h, mean, rstd


def backward(grad_y, grad_h, h, weight, mean, rstd, need_x, need_weight, need_bias):
    """Gradients of x (with the residual's gradient grad_h added), weight and bias; empty tensors for those not needed."""
    grad_x = empty(h, h.shape, need_x)
    grad_weight, grad_bias = empty(weight, weight.shape, need_weight), empty(weight, weight.shape, need_bias)
    if h.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    h_rows, upstream, more = rows(h), rows(grad_y), None if grad_h is None else rows(grad_h)
    strips, length = strips_of(h_rows.count)
    partials = empty(h, (need_weight + need_bias, strips, h_rows.width), dtype=torch.float32)
    config = pick("layer_norm_backward", TYPES[h.dtype], size_class(h_rows.width))
    _layer_norm_backward[strips,](
        *upstream.arguments, *row_arguments(more), *h_rows.arguments, weight.contiguous(), mean, rstd,
        grad_x if need_x else None, partials[0] if need_weight else None, partials[-1] if need_bias else None,
        h_rows.count, h_rows.width, length, **config.options,
    )  # fmt: skip
    if need_weight or need_bias:
        merge(partials, *(grad for grad, need in ((grad_weight, need_weight), (grad_bias, need_bias)) if need))
    return grad_x, grad_weight, grad_bias
