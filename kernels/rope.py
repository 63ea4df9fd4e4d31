"""Rotary positions and RMS norm of q and k within rows (q, k, v) of heads, in one pass either way; v passes through: ov3fast/ops/rope.py.

A row here is one head of one token, of q, k or v. Neighbouring channels lie in one thread, so that a pair turns without leaving its registers. Without
norms the backward is the forward with the angles' signs changed. With them each program owns a strip of rows and writes partial sums of the weights'
gradients, which `merge` adds up.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .lib.common import TYPES, cdiv, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel
from .lib.reduce import merge, strips_of
from .lib.rows import empty, row_offsets, rows

# Size classes: the smallest of these that holds a head.
WIDTHS = (64, 128, 256)
TABLE["rope_forward"] = {(ANY, str(p), ANY): Config({"BLOCK_ROWS": 2048 // p, "BLOCK_P": p}, warps=4, stages=1) for p in WIDTHS}
TABLE["rope_backward"] = {
    (ANY, str(p), ANY): Config({"BLOCK_ROWS": 1024 // p, "BLOCK_P": p}, warps=4, stages=1) for p in WIDTHS
}


@triton.jit
def _load(x, row, mask, x_inner, x_outer_stride, x_inner_stride, heads, width, column):
    """Rows of heads in float32; row_offsets gives those of tokens."""
    at = row_offsets(row // (3 * heads), x_inner, x_outer_stride, x_inner_stride) + row % (3 * heads) * width
    return tl.load(x + at[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _turned(value, cos, sin, SIGN, row, mask_turned, tokens, heads, width, BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Neighbouring channels turned by their token's angles."""
    pair = tl.arange(0, BLOCK_P // 2)
    at = (row // (3 * heads) % tokens)[:, None] * (width // 2) + pair[None, :]
    mask = mask_turned[:, None] & (pair < width // 2)[None, :]
    c = tl.load(cos + at, mask=mask, other=0).to(tl.float32)
    s = tl.load(sin + at, mask=mask, other=0).to(tl.float32) * SIGN
    even, odd = tl.split(tl.reshape(value, (BLOCK_ROWS, BLOCK_P // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK_ROWS, BLOCK_P))


@triton.jit
def _weight(weight, column, width):
    return tl.load(weight + column, mask=column < width, other=0).to(tl.float32)[None, :]


@kernel
def _rope_forward(
    qkv, qkv_inner, qkv_outer_stride, qkv_inner_stride, cos, sin, q_weight, k_weight, out, rows, tokens, heads, width, eps,
    SIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_P)
    part = row % (3 * heads) // heads
    mask = (row < rows)[:, None] & (column < width)[None, :]
    value = _load(qkv, row, mask, qkv_inner, qkv_outer_stride, qkv_inner_stride, heads, width, column)
    result = value
    if q_weight is not None:
        scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
        of_q, of_k = _weight(q_weight, column, width), _weight(k_weight, column, width)
        result = value * scale[:, None] * tl.where((part == 0)[:, None], of_q, of_k)
    turns = (row < rows) & (part < 2)
    result = _turned(result, cos, sin, SIGN, row, turns, tokens, heads, width, BLOCK_ROWS, BLOCK_P)
    result = tl.where(turns[:, None], result, value)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, rounded(result, out.dtype.element_ty), mask=mask)


@kernel
def _rope_backward(
    grad_y, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, qkv, qkv_inner, qkv_outer_stride, qkv_inner_stride,
    cos, sin, q_weight, k_weight, grad_qkv, weight_partials, rows, strips, rows_per_strip, tokens, heads, width, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """weight_partials [2, strips, P]."""
    strip = tl.program_id(0)
    column = tl.arange(0, BLOCK_P)
    of_q, of_k = _weight(q_weight, column, width), _weight(k_weight, column, width)
    q_sum, k_sum = tl.zeros((BLOCK_ROWS, BLOCK_P), tl.float32), tl.zeros((BLOCK_ROWS, BLOCK_P), tl.float32)
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        part = row % (3 * heads) // heads
        turns = (row < last) & (part < 2)
        mask = (row < last)[:, None] & (column < width)[None, :]
        upstream = _load(grad_y, row, mask, grad_y_inner, grad_y_outer_stride, grad_y_inner_stride, heads, width, column)
        normed = turns[:, None] & (column < width)[None, :]
        value = _load(qkv, row, normed, qkv_inner, qkv_outer_stride, qkv_inner_stride, heads, width, column)
        back = _turned(upstream, cos, sin, -1, row, turns, tokens, heads, width, BLOCK_ROWS, BLOCK_P)
        scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
        back *= scale
        if weight_partials is not None:
            q_sum += tl.where((turns & (part == 0))[:, None], back * value, 0)
            k_sum += tl.where((turns & (part == 1))[:, None], back * value, 0)
        if grad_qkv is not None:
            scaled = back * tl.where((part == 0)[:, None], of_q, of_k)
            along = tl.sum(scaled * value, 1)[:, None] / width * (scale * scale)
            result = tl.where(turns[:, None], scaled - value * along, upstream)
            at = row.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(grad_qkv + at, rounded(result, grad_qkv.dtype.element_ty), mask=mask)
    if weight_partials is not None:
        at = strip.to(tl.int64) * width + column
        tl.store(weight_partials + at, tl.sum(q_sum, 0), mask=column < width)
        tl.store(weight_partials + strips * width + at, tl.sum(k_sum, 0), mask=column < width)


@functools.cache
def _size(width: int) -> str:
    return str(next(block for block in WIDTHS if block >= width))


def forward(qkv, cos, sin, q_weight, k_weight, eps, sign=1):
    """qkv [B, N, 3, H, P], any strides; cos, sin [N, P / 2]; weights [P] or None. sign -1 turns back."""
    out = empty(qkv, qkv.shape)
    if out.numel():
        _, tokens, _, heads, width = qkv.shape
        config, count = pick("rope_forward", TYPES[qkv.dtype], _size(width)), qkv.numel() // width
        weights = (None, None) if q_weight is None else (q_weight.contiguous(), k_weight.contiguous())
        _rope_forward[cdiv(count, config.blocks["BLOCK_ROWS"]),](
            *rows(qkv.flatten(2)).arguments, cos.contiguous(), sin.contiguous(), *weights, out,
            count, tokens, heads, width, float(eps), SIGN=sign, **config.options,
        )  # fmt: skip
    return out


def backward(grad_y, cos, sin, qkv, q_weight, k_weight, eps, need_qkv, need_q_weight, need_k_weight):
    """Gradients of qkv, q_weight and k_weight; an empty tensor where one is not asked for."""
    none = empty(grad_y, 0)
    if q_weight is None:
        return forward(grad_y, cos, sin, None, None, eps, -1) if need_qkv else none, none, none
    _, tokens, _, heads, width = qkv.shape
    need_weights, count = need_q_weight or need_k_weight, qkv.numel() // width
    grad_qkv = empty(qkv, qkv.shape, need_qkv)
    strips, length = strips_of(count)
    partials = empty(qkv, (2, strips, width), need_weights, torch.float32)
    config = pick("rope_backward", TYPES[qkv.dtype], _size(width))
    _rope_backward[strips,](
        *rows(grad_y.flatten(2)).arguments, *rows(qkv.flatten(2)).arguments, cos.contiguous(), sin.contiguous(),
        q_weight.contiguous(), k_weight.contiguous(), grad_qkv if need_qkv else None, partials if need_weights else None,
        count, strips, length, tokens, heads, width, float(eps), **config.options,
    )  # fmt: skip
    of_q, of_k = empty(q_weight, width, need_q_weight), empty(k_weight, width, need_k_weight)
    if need_q_weight and need_k_weight:
        merge(partials, of_q, of_k)
    elif need_weights:
        merge(partials[:1] if need_q_weight else partials[1:], of_q if need_q_weight else of_k)
    return grad_qkv, of_q, of_k
