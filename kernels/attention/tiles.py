"""Tiles of attention: rows of q, k, v and their gradients, the mask, the online softmax, and the arguments of a launch.

A head dimension is covered by one or two powers of two, D0 + D1: 72 and 80 are 64 + 16, 96 is 64 + 32; tiles are tuples of one or two parts.

A float32 product is three TF32 products, whose operands take two registers per value, and wide heads alone exceed 255 registers. In these cases
(STEP > 0) dot_qk loads both operands STEP columns at a time, and hoisting out of the loops over blocks is disabled (disable_licm).

Names: q, k, v, out, grad_out [B,N,H,D]; lse, delta and weight [B,H,Nq] float32; x_b, x_n, x_h are x's strides, in units of 16 bytes if ALIGNED
(so that the compiler can assume alignment), else in elements.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ..lib.common import dot, rounded
from .config import WIDTHS

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN_2: tl.constexpr = tl.constexpr(math.log(2))
INF: tl.constexpr = tl.constexpr(math.inf)


def plain(*views: str) -> list[str]:
    """Integer arguments not worth specialising on: it would only compile more variants."""
    return ["heads", "queries", "keys", "prefix_len", *(f"{view}_{axis}" for view in views for axis in "bnh")]


@triton.jit
def _part(base, start, stride, rows, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to ROWS rows from `start` and COLS columns from FIRST, with a mask for rows below `rows` and columns below D."""
    row = tl.arange(0, ROWS)
    col = FIRST + tl.arange(0, COLS)
    stride = stride.to(tl.int64)
    pointers = base + stride * start + (row[:, None] * stride + col[None, :])
    mask = (row < rows - start)[:, None]
    if FIRST + COLS > D:
        mask = mask & (col < D)[None, :]
    return pointers, mask


@triton.jit
def _load_part(
    base,
    start,
    stride,
    rows,
    FIRST: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    pointers, mask = _part(base, start, stride, rows, FIRST, COLS, D, ROWS)
    if BOUNDED:
        return tl.load(pointers, mask=mask, other=0.0)
    elif FIRST + COLS > D:
        return tl.load(pointers, mask=((FIRST + tl.arange(0, COLS)) < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load(
    base,
    start,
    stride,
    rows,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Rows [start, start + ROWS). If BOUNDED, rows from `rows` on are 0; otherwise all must exist."""
    main = _load_part(base, start, stride, rows, 0, D0, D, ROWS, BOUNDED)
    if D1 > 0:
        return main, _load_part(base, start, stride, rows, D0, D1, D, ROWS, BOUNDED)
    else:
        return (main,)


@triton.jit
def store_part(value, base, start, stride, rows, FIRST: tl.constexpr, D: tl.constexpr):
    pointers, mask = _part(base, start, stride, rows, FIRST, value.shape[1], D, value.shape[0])
    tl.store(pointers, rounded(value, base.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    main = tl.zeros([ROWS, D0], tl.float32)
    if D1 > 0:
        return main, tl.zeros([ROWS, D1], tl.float32)
    else:
        return (main,)


@triton.jit
def scaled(tile, factor, D1: tl.constexpr):
    if D1 > 0:
        return tile[0] * factor, tile[1] * factor
    else:
        return (tile[0] * factor,)


@triton.jit
def operand(
    base, start, stride, rows, factor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """An operand of dot_qk: a tile or, with STEP > 0, the pointers to its rows; float32 rows are multiplied by `factor`."""
    if STEP > 0:
        return base, start, stride, rows, factor
    else:
        return load(base, start, stride, rows, D, D0, D1, ROWS, BOUNDED)


@triton.jit
def load_tile(
    x, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr
):
    """The full tile of an `operand`."""
    if STEP > 0:
        base, start, stride, rows, factor = x
        tile = load(base, start, stride, rows, D, D0, D1, ROWS, BOUNDED)
        if base.dtype.element_ty == tl.float32:
            tile = scaled(tile, factor, D1)
        return tile
    else:
        return x


@triton.jit
def _columns(x, first, D: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr):
    """Loads columns [first, first + STEP) of an operand given by pointers."""
    base, start, stride, rows, factor = x
    row = tl.arange(0, ROWS)
    col = first + tl.arange(0, STEP)
    mask = (row < rows - start)[:, None]
    if D % STEP != 0:
        mask = mask & (col < D)[None, :]
    stride = stride.to(tl.int64)
    part = tl.load(base + stride * start + (row[:, None] * stride + col[None, :]), mask=mask, other=0.0)
    if base.dtype.element_ty == tl.float32:
        part = part * factor
    return part


@triton.jit
def dot_qk(a, b, D: tl.constexpr, D1: tl.constexpr, STEP: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """a b^T of two operands. With STEP > 0 each step has its own accumulator: one long chain would lose float32 precision."""
    nothing = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    if STEP > 0:
        c = nothing
        for first in tl.range(0, D, STEP):
            c += dot(_columns(a, first, D, STEP, A_ROWS), tl.trans(_columns(b, first, D, STEP, B_ROWS)), nothing)
    else:
        c = dot(a[0], tl.trans(b[0]), nothing)
        if D1 > 0:
            c = dot(a[1], tl.trans(b[1]), c)
    return c


@triton.jit
def dot_pv(a, b, c, D1: tl.constexpr):
    """a b + c."""
    main = dot(a, b[0], c[0])
    if D1 > 0:
        return main, dot(a, b[1], c[1])
    else:
        return (main,)


@triton.jit
def visible_keys(row, queries, keys, prefix_len, CAUSAL: tl.constexpr):
    """Number of leading keys that query `row` sees; nonnegative and nondecreasing in `row`."""
    if CAUSAL:
        return tl.minimum(tl.maximum(tl.maximum(row + 1 + keys - queries, prefix_len), 0), keys)
    else:
        return row * 0 + keys


@triton.jit
def softmax_step(scores, m_i, l_i, scale, EXACT: tl.constexpr, POSITIVE: tl.constexpr):
    """One step of the online softmax: returns p, the rescaling factor alpha, the running maximum m_i and sum l_i.

    EXACT: exp of the scores; else exp2, in units of log 2. POSITIVE: scale > 0, and scores and m_i are not yet multiplied by it.
    """
    before = m_i
    m_i = tl.maximum(before, tl.max(scores, 1))
    # inf - inf would turn an lse of inf or -inf into NaN.
    shift = tl.where(tl.abs(m_i) == INF, 0.0, m_i)
    if EXACT:
        p = tl.exp(scores - shift[:, None])
        alpha = tl.exp(before - shift)
    elif POSITIVE:
        shift = shift * scale
        p = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        alpha = tl.exp2(tl.fma(before, scale, -shift))
    else:
        p = tl.exp2(scores - shift[:, None])
        alpha = tl.exp2(before - shift)
    return p, alpha, m_i, l_i * alpha + tl.sum(p, 1)


def parts(head_dim: int, dtype: str) -> tuple[int, int]:
    """D0 and D1, powers of two of at least 16 (D1 may be 0), that cover the head dimension with the fewest columns.

    In float32, D0 plus a D1 of 32 or 64 does not fit in 255 registers.
    """
    if dtype == "fp32" and head_dim > 128:
        return 128, 128
    d0 = max(16, 1 << (max(head_dim, 1).bit_length() - 1))
    if d0 >= head_dim:
        return d0, 0
    d1 = max(16, triton.next_power_of_2(head_dim - d0))
    return (2 * d0, 0) if d1 >= (d0 if dtype != "fp32" else 32) else (d0, d1)


@functools.cache
def size_class(head_dim: int) -> str:
    """The narrowest size class of config.py that covers the tiles."""
    return next(name for name in WIDTHS if sum(parts(head_dim, "bf16")) <= int(name))


def step(head_dim: int, dtype: str) -> int:
    """Columns that dot_qk loads at a time, 0 for all: two full tiles of float32 or of a wide head exceed 255 registers."""
    columns = sum(parts(head_dim, dtype))
    if dtype == "fp32":
        return 16 if columns % 32 else 32
    return 64 if columns > 128 else 0


@functools.lru_cache(1024)
def constexprs(head_dim: int, dtype: str, causal: bool, aligned: bool) -> dict[str, int | bool]:
    d0, d1 = parts(head_dim, dtype)
    return {"D": head_dim, "D0": d0, "D1": d1, "STEP": step(head_dim, dtype), "CAUSAL": causal, "ALIGNED": aligned}


def layout(*views: torch.Tensor) -> tuple[bool, tuple[int, ...]]:
    """(whether all strides but the last are multiples of 16 bytes; these strides, in units of 16 bytes if so, else in elements)."""
    return _layout(16 // views[0].element_size(), *[view.stride() for view in views])


@functools.lru_cache(4096)
def _layout(unit: int, *of_views: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
    strides = tuple(stride for view in of_views for stride in view[:3])
    aligned = all(stride % unit == 0 for stride in strides)
    return aligned, tuple(stride // unit for stride in strides) if aligned else strides


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def in_units(dtype: torch.dtype, scale: float) -> float:
    return scale if dtype == torch.float32 else scale * math.log2(math.e)
