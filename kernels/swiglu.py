"""SwiGLU's gated activation of rows (gate, value), in one pass either way: ov3fast/ops/swiglu.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .lib.common import TYPES, cdiv, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel
from .lib.rows import empty, row_offsets, rows

# Size classes: none.
TABLE["swiglu_forward"] = {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 4, "BLOCK_H": 512}, warps=4, stages=1)}
TABLE["swiglu_backward"] = {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 2, "BLOCK_H": 512}, warps=4, stages=1)}


@triton.jit
def _tile(rows, hidden, BLOCK_ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rows and columns of this program, and which of them exist. Blocks of one row's columns are neighbours in the grid."""
    blocks = tl.cdiv(hidden, BLOCK_H)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    return row, column, (row < rows)[:, None] & (column < hidden)[None, :]


@kernel
def _swiglu_forward(
    x, x_inner, x_outer_stride, x_inner_stride, y, rows, hidden, BLOCK_ROWS: tl.constexpr, BLOCK_H: tl.constexpr
):
    row, column, mask = _tile(rows, hidden, BLOCK_ROWS, BLOCK_H)
    at = row_offsets(row, x_inner, x_outer_stride, x_inner_stride)[:, None] + column[None, :]
    gate = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    value = tl.load(x + at + hidden, mask=mask, other=0).to(tl.float32)
    result = gate / (1 + tl.exp(-gate)) * value
    tl.store(y + row.to(tl.int64)[:, None] * hidden + column[None, :], rounded(result, y.dtype.element_ty), mask=mask)


@kernel
def _swiglu_backward(
    grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, x, x_inner, x_outer_stride, x_inner_stride, grad_x, rows, hidden,
    BLOCK_ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row, column, mask = _tile(rows, hidden, BLOCK_ROWS, BLOCK_H)
    at = row_offsets(row, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride)[:, None] + column[None, :]
    upstream = tl.load(grad_y + at, mask=mask, other=0).to(tl.float32)
    at = row_offsets(row, x_inner, x_outer_stride, x_inner_stride)[:, None] + column[None, :]
    gate = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    value = tl.load(x + at + hidden, mask=mask, other=0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    out = grad_x + row.to(tl.int64)[:, None] * (2 * hidden) + column[None, :]
    of_gate = upstream * value * (share * (1 + gate * (1 - share)))
    tl.store(out, rounded(of_gate, grad_x.dtype.element_ty), mask=mask)
    tl.store(out + hidden, rounded(upstream * (gate * share), grad_x.dtype.element_ty), mask=mask)


def _grid(rows, hidden, config):
    return (cdiv(rows, config.blocks["BLOCK_ROWS"]) * cdiv(hidden, config.blocks["BLOCK_H"]),)


def forward(x):
    """x [..., 2 H], any strides -> [..., H]."""
    hidden = x.shape[-1] // 2
    y = empty(x, (*x.shape[:-1], hidden))
    if y.numel():
        x_rows, config = rows(x), pick("swiglu_forward", TYPES[x.dtype])
        _swiglu_forward[_grid(x_rows.count, hidden, config)](*x_rows.arguments, y, x_rows.count, hidden, **config.options)
    return y


def backward(grad_y, x, need_x):
    grad_x = empty(x, x.shape)
    if x.numel():
        upstream, x_rows, config = rows(grad_y), rows(x), pick("swiglu_backward", TYPES[x.dtype])
        _swiglu_backward[_grid(x_rows.count, upstream.width, config)](
            *upstream.arguments, *x_rows.arguments, grad_x, x_rows.count, upstream.width, **config.options
        )
    return grad_x
