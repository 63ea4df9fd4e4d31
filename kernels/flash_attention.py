"""Attention on tiles: softmax online in the forward; in the backward one kernel over query blocks, then one over key blocks, no atomics.

A head dimension is tiled by two parts, MAIN + REST, each a power of two: 72 and 80 are 64 + 16, 96 is 64 + 32; tiles of such rows are tuples
of one part or two. Blocks of keys (or queries) that nobody in the block sees are skipped, and only those on the border of what is seen are
masked. 16-bit scores are kept in units of log 2; float32 goes through q * scale and exp, as PyTorch does, so that the probability of a
single key is 1 to the last bit.

The kernel over query blocks gets delta_i = sum_d gout_id out_id from an out that was rounded, which shifts all gs_ij of a row: they no longer
sum to 0, and keys with a common offset turn that into an error far over the budget. So it sums the gs_ij as it rounded them, takes
that times the mean of the first keys from grad_q (an offset of all keys has no part in the exact gradient), and adds it to delta, for grad_k.
In float32 lse's own rounding counts as well: weight_i = 1 / sum_j p_ij puts it right.

Names: q, k, v, out, grad_out [B,N,H,D]; lse, delta and weight [B,H,Nq] float32; x_b, x_n, x_h are x's strides in units of 16 bytes if ALIGNED
(so that the compiler knows it), else in elements.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from . import configs
from .catalog import Entry, Work
from .common import SIZES, TYPES, argument_types, cdiv, dot, rounded

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN_2: tl.constexpr = tl.constexpr(math.log(2))
INF: tl.constexpr = tl.constexpr(math.inf)


def _plain(*views: str) -> list[str]:
    """Integers whose values tell the compiler nothing that it could use: specialising on them only compiles more often."""
    return ["heads", "queries", "keys", "prefix_len", *(f"{view}_{axis}" for view in views for axis in "bnh")]


@triton.jit
def _part(base, start, stride, rows, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to ROWS rows from `start` on, COLS columns from FIRST on; a mask of those below `rows` and below D."""
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
def _load(
    base,
    start,
    stride,
    rows,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Rows [start, start + ROWS), 0 from row `rows` on if BOUNDED (else there must be no such row)."""
    main = _load_part(base, start, stride, rows, 0, MAIN, D, ROWS, BOUNDED)
    if REST > 0:
        return main, _load_part(base, start, stride, rows, MAIN, REST, D, ROWS, BOUNDED)
    else:
        return (main,)


@triton.jit
def _store_part(value, base, start, stride, rows, FIRST: tl.constexpr, D: tl.constexpr):
    pointers, mask = _part(base, start, stride, rows, FIRST, value.shape[1], D, value.shape[0])
    tl.store(pointers, rounded(value, base.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    main = tl.zeros([ROWS, MAIN], tl.float32)
    if REST > 0:
        return main, tl.zeros([ROWS, REST], tl.float32)
    else:
        return (main,)


@triton.jit
def _scale(tile, factor, REST: tl.constexpr):
    if REST > 0:
        return tile[0] * factor, tile[1] * factor
    else:
        return (tile[0] * factor,)


@triton.jit
def _over_columns(a, b, REST: tl.constexpr):
    """a b^T; in float32 the parts are summed by themselves, since long chains lose digits."""
    nothing = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    c = dot(a[0], tl.trans(b[0]), nothing)
    if REST > 0 and a[0].dtype == tl.float32:
        c += dot(a[1], tl.trans(b[1]), nothing)
    elif REST > 0:
        c = dot(a[1], tl.trans(b[1]), c)
    return c


@triton.jit
def _over_rows(a, b, c, REST: tl.constexpr):
    """a b + c."""
    main = dot(a, b[0], c[0])
    if REST > 0:
        return main, dot(a, b[1], c[1])
    else:
        return (main,)


@triton.jit
def _visible(row, queries, keys, prefix_len, CAUSAL: tl.constexpr):
    """How many keys query `row` sees, the first ones: never negative, and never falling from row to row."""
    if CAUSAL:
        return tl.minimum(tl.maximum(tl.maximum(row + 1 + keys - queries, prefix_len), 0), keys)
    else:
        return row * 0 + keys


@triton.jit
def _attend(
    state, q, k, v, k_n, v_n, scale, visible, keys, first, last,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_KEYS: tl.constexpr, BORDER: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    """Takes keys [first, last) into (out, largest score, sum of exponentials); the largest score is unscaled if POSITIVE."""
    out, largest, total = state
    EXACT: tl.constexpr = q[0].dtype == tl.float32
    for start in tl.range(first, last, BLOCK_KEYS):
        k_tile = _load(k, start, k_n, keys, D, MAIN, REST, BLOCK_KEYS, BORDER)
        scores = _over_columns(q, k_tile, REST)
        if not EXACT and not POSITIVE:
            scores = scores * scale
        if BORDER:
            scores = tl.where((start + tl.arange(0, BLOCK_KEYS))[None, :] < visible[:, None], scores, -INF)
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        # inf - inf would make lse NaN where it has to be inf or -inf.
        shift = tl.where(tl.abs(largest) == INF, 0.0, largest)
        if EXACT:
            p = tl.exp(scores - shift[:, None])
            fade = tl.exp(before - shift)
        elif POSITIVE:
            shift = shift * scale
            p = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
            fade = tl.exp2(tl.fma(before, scale, -shift))
        else:
            p = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(before - shift)
        total = total * fade + tl.sum(p, 1)
        v_tile = _load(v, start, v_n, keys, D, MAIN, REST, BLOCK_KEYS, BORDER)
        out = _over_rows(rounded(p, q[0].dtype), v_tile, _scale(out, fade[:, None], REST), REST)
    return out, largest, total


@triton.jit(do_not_specialize=_plain("q", "k", "v", "out"))
def _flash_attention_forward(
    q, k, v, out, lse,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h,
    heads, queries, keys, prefix_len, scale,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A program: one block of queries of one head. scale: in units of log 2 for 16 bits; POSITIVE says that it is over 0."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    UNIT: tl.constexpr = 128 // DTYPE.primitive_bitwidth if ALIGNED else 1
    blocks = tl.cdiv(queries, BLOCK_QUERIES)
    head = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks
    if CAUSAL:  # the longest rows first
        start = blocks - 1 - start
    start = start * BLOCK_QUERIES
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    out += (b * out_b + h * out_h) * UNIT

    row = start + tl.arange(0, BLOCK_QUERIES)
    visible = _visible(row, queries, keys, prefix_len, CAUSAL)
    border = _visible(start, queries, keys, prefix_len, CAUSAL) // BLOCK_KEYS * BLOCK_KEYS
    end = _visible(tl.minimum(start + BLOCK_QUERIES, queries) - 1, queries, keys, prefix_len, CAUSAL)

    q_tile = _load(q, start, q_n * UNIT, queries, D, MAIN, REST, BLOCK_QUERIES, True)
    if DTYPE == tl.float32:
        q_tile = _scale(q_tile, scale, REST)
    state = (
        _zeros(BLOCK_QUERIES, MAIN, REST),
        tl.full([BLOCK_QUERIES], -INF, tl.float32),
        tl.zeros([BLOCK_QUERIES], tl.float32),
    )
    state = _attend(
        state, q_tile, k, v, k_n * UNIT, v_n * UNIT, scale, visible, keys, 0, border,
        D, MAIN, REST, BLOCK_KEYS, False, POSITIVE,
    )  # fmt: skip
    state = _attend(
        state, q_tile, k, v, k_n * UNIT, v_n * UNIT, scale, visible, keys, border, end,
        D, MAIN, REST, BLOCK_KEYS, True, POSITIVE,
    )  # fmt: skip

    out_tile, largest, total = state
    shift = tl.where(tl.abs(largest) == INF, 0.0, largest)
    if DTYPE == tl.float32:
        logarithm = shift + tl.log(total)
    elif POSITIVE:
        logarithm = (shift * scale + tl.log2(total)) * LN_2
    else:
        logarithm = (shift + tl.log2(total)) * LN_2
    tl.store(lse + head.to(tl.int64) * queries + row, logarithm, mask=row < queries)
    blind = (visible == 0)[:, None]
    inverse = (1.0 / total)[:, None]
    _store_part(tl.where(blind, 0.0, out_tile[0] * inverse), out, start, out_n * UNIT, queries, 0, D)
    if REST > 0:
        _store_part(tl.where(blind, 0.0, out_tile[1] * inverse), out, start, out_n * UNIT, queries, MAIN, D)


@triton.jit
def _query_gradient(
    state, q, grad_out, k, v, k_n, v_n, lse, delta, scale, visible, keys, first, last,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_KEYS: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Adds keys [first, last) to (sum_j gs_ij k_j, sum_j gs_ij, sum_j p_ij)."""
    grad_q, excess, mass = state
    for start in tl.range(first, last, BLOCK_KEYS):
        k_tile = _load(k, start, k_n, keys, D, MAIN, REST, BLOCK_KEYS, BORDER)
        v_tile = _load(v, start, v_n, keys, D, MAIN, REST, BLOCK_KEYS, BORDER)
        scores = _over_columns(q, k_tile, REST)
        if q[0].dtype == tl.float32:
            p = tl.exp(scores - lse[:, None])
        else:
            p = tl.exp2(tl.fma(scores, scale, -lse[:, None]))
        if BORDER:
            p = tl.where((start + tl.arange(0, BLOCK_KEYS))[None, :] < visible[:, None], p, 0.0)
        if q[0].dtype == tl.float32:
            mass += tl.sum(p, 1)
        grad_p = _over_columns(grad_out, v_tile, REST)
        grad_s = rounded(p * (grad_p - delta[:, None]), q[0].dtype)
        excess += tl.sum(grad_s.to(tl.float32), 1)
        grad_q = _over_rows(grad_s, k_tile, grad_q, REST)
    return grad_q, excess, mass


@triton.jit
def _row_sums(a, b, REST: tl.constexpr):
    """sum_d a_id b_id."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if REST > 0:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=_plain("grad_out", "q", "k", "v", "out", "grad_q"))
def _flash_attention_grad_q(
    grad_out, q, k, v, out, lse, grad_q, delta, weight,
    grad_out_b, grad_out_n, grad_out_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h, grad_q_b, grad_q_n, grad_q_h,
    heads, queries, keys, prefix_len, scale, grad_scale,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A program: grad_q and delta (and weight, for float32) of one block of queries of one head."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    UNIT: tl.constexpr = 128 // DTYPE.primitive_bitwidth if ALIGNED else 1
    blocks = tl.cdiv(queries, BLOCK_QUERIES)
    head = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks
    if CAUSAL:
        start = blocks - 1 - start
    start = start * BLOCK_QUERIES
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    grad_out += (b * grad_out_b + h * grad_out_h) * UNIT
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    out += (b * out_b + h * out_h) * UNIT
    grad_q += (b * grad_q_b + h * grad_q_h) * UNIT
    lse += head.to(tl.int64) * queries
    delta += head.to(tl.int64) * queries
    weight += head.to(tl.int64) * queries

    row = start + tl.arange(0, BLOCK_QUERIES)
    visible = _visible(row, queries, keys, prefix_len, CAUSAL)
    border = _visible(start, queries, keys, prefix_len, CAUSAL) // BLOCK_KEYS * BLOCK_KEYS
    end = _visible(tl.minimum(start + BLOCK_QUERIES, queries) - 1, queries, keys, prefix_len, CAUSAL)

    grad_tile = _load(grad_out, start, grad_out_n * UNIT, queries, D, MAIN, REST, BLOCK_QUERIES, True)
    out_tile = _load(out, start, out_n * UNIT, queries, D, MAIN, REST, BLOCK_QUERIES, True)
    delta_row = _row_sums(grad_tile, out_tile, REST)
    q_tile = _load(q, start, q_n * UNIT, queries, D, MAIN, REST, BLOCK_QUERIES, True)
    # Rows past the end get probabilities 0.
    lse_row = tl.load(lse + row, mask=row < queries, other=INF)
    if DTYPE == tl.float32:
        q_tile = _scale(q_tile, scale, REST)
    else:
        lse_row = lse_row * LOG2_E
    nothing = tl.zeros([BLOCK_QUERIES], tl.float32)
    state = (_zeros(BLOCK_QUERIES, MAIN, REST), nothing, nothing)
    state = _query_gradient(
        state, q_tile, grad_tile, k, v, k_n * UNIT, v_n * UNIT, lse_row, delta_row, scale, visible, keys, 0, border,
        D, MAIN, REST, BLOCK_KEYS, False,
    )  # fmt: skip
    state = _query_gradient(
        state, q_tile, grad_tile, k, v, k_n * UNIT, v_n * UNIT, lse_row, delta_row, scale, visible, keys, border, end,
        D, MAIN, REST, BLOCK_KEYS, True,
    )  # fmt: skip

    grad_tile, excess, mass = state
    if DTYPE == tl.float32:
        inverse = tl.where(mass > 0, 1.0 / mass, 1.0)
        tl.store(weight + row, inverse, mask=row < queries)
        excess = excess * inverse
        grad_tile = _scale(grad_tile, inverse[:, None], REST)
    # An infinite gradient stays one.
    excess = tl.where(tl.abs(excess) < INF, excess, 0.0)
    tl.store(delta + row, delta_row + excess, mask=row < queries)
    first_keys = _load(k, start * 0, k_n * UNIT, keys, D, MAIN, REST, BLOCK_KEYS, True)
    count = tl.maximum(tl.minimum(keys, BLOCK_KEYS), 1).to(tl.float32)
    mean = tl.sum(first_keys[0].to(tl.float32), 0) / count
    main = (grad_tile[0] - excess[:, None] * mean[None, :]) * grad_scale
    _store_part(main, grad_q, start, grad_q_n * UNIT, queries, 0, D)
    if REST > 0:
        mean = tl.sum(first_keys[1].to(tl.float32), 0) / count
        rest = (grad_tile[1] - excess[:, None] * mean[None, :]) * grad_scale
        _store_part(rest, grad_q, start, grad_q_n * UNIT, queries, MAIN, D)


@triton.jit
def _key_gradients(
    state, k, v, grad_out, q, grad_out_n, q_n, lse, delta, weight, scale, key, queries, keys, prefix_len, first, last,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Adds queries [first, last) to (grad_k, grad_v). Scores are keys by queries: nothing has to be transposed on the way to a product."""
    grad_k, grad_v = state
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    for start in tl.range(first, last, BLOCK_QUERIES):
        row = start + tl.arange(0, BLOCK_QUERIES)
        q_tile = _load(q, start, q_n, queries, D, MAIN, REST, BLOCK_QUERIES, True)
        grad_tile = _load(grad_out, start, grad_out_n, queries, D, MAIN, REST, BLOCK_QUERIES, True)
        # Rows past the end get probabilities 0.
        lse_row = tl.load(lse + row, mask=row < queries, other=INF)
        delta_row = tl.load(delta + row, mask=row < queries, other=0.0)
        if EXACT:
            q_tile = _scale(q_tile, scale, REST)
            weight_row = tl.load(weight + row, mask=row < queries, other=1.0)
            p = tl.exp(_over_columns(k, q_tile, REST) - lse_row[None, :]) * weight_row[None, :]
        else:
            lse_row = lse_row * LOG2_E
            p = tl.exp2(tl.fma(_over_columns(k, q_tile, REST), scale, -lse_row[None, :]))
        if BORDER:
            visible = _visible(row, queries, keys, prefix_len, True)
            p = tl.where(key[:, None] < visible[None, :], p, 0.0)
        grad_v = _over_rows(rounded(p, q.dtype.element_ty), grad_tile, grad_v, REST)
        grad_p = _over_columns(v, grad_tile, REST)
        grad_s = rounded(p * (grad_p - delta_row[None, :]), q.dtype.element_ty)
        grad_k = _over_rows(grad_s, q_tile, grad_k, REST)
    return grad_k, grad_v


@triton.jit(do_not_specialize=_plain("grad_out", "q", "k", "v", "grad_k", "grad_v"))
def _flash_attention_grad_kv(
    grad_out, q, k, v, lse, delta, weight, grad_k, grad_v,
    grad_out_b, grad_out_n, grad_out_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    grad_k_b, grad_k_n, grad_k_h, grad_v_b, grad_v_n, grad_v_h,
    heads, queries, keys, prefix_len, scale, grad_scale,
    D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A program: grad_k and grad_v of one block of keys of one head."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    UNIT: tl.constexpr = 128 // DTYPE.primitive_bitwidth if ALIGNED else 1
    blocks = tl.cdiv(keys, BLOCK_KEYS)
    head = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_KEYS
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    grad_out += (b * grad_out_b + h * grad_out_h) * UNIT
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    grad_k += (b * grad_k_b + h * grad_k_h) * UNIT
    grad_v += (b * grad_v_b + h * grad_v_h) * UNIT
    lse += head.to(tl.int64) * queries
    delta += head.to(tl.int64) * queries
    weight += head.to(tl.int64) * queries

    key = start + tl.arange(0, BLOCK_KEYS)
    k_tile = _load(k, start, k_n * UNIT, keys, D, MAIN, REST, BLOCK_KEYS, True)
    v_tile = _load(v, start, v_n * UNIT, keys, D, MAIN, REST, BLOCK_KEYS, True)
    state = (_zeros(BLOCK_KEYS, MAIN, REST), _zeros(BLOCK_KEYS, MAIN, REST))
    border = start * 0
    if CAUSAL:
        # The first query that sees the block's first key, and the first that sees all of its keys; the prefix is seen by all.
        last_key = tl.minimum(start + BLOCK_KEYS, keys) - 1
        first = tl.where(start < prefix_len, 0, tl.maximum(start + queries - keys, 0)) // BLOCK_QUERIES * BLOCK_QUERIES
        border = tl.where(last_key < prefix_len, 0, tl.maximum(last_key + queries - keys, 0))
        border = tl.minimum(tl.cdiv(border, BLOCK_QUERIES) * BLOCK_QUERIES, queries)
        state = _key_gradients(
            state, k_tile, v_tile, grad_out, q, grad_out_n * UNIT, q_n * UNIT, lse, delta, weight, scale, key, queries, keys, prefix_len,
            first, border, D, MAIN, REST, BLOCK_QUERIES, True,
        )  # fmt: skip
    state = _key_gradients(
        state, k_tile, v_tile, grad_out, q, grad_out_n * UNIT, q_n * UNIT, lse, delta, weight, scale, key, queries, keys, prefix_len,
        border, queries, D, MAIN, REST, BLOCK_QUERIES, False,
    )  # fmt: skip
    k_out, v_out = state
    _store_part(k_out[0] * grad_scale, grad_k, start, grad_k_n * UNIT, keys, 0, D)
    _store_part(v_out[0], grad_v, start, grad_v_n * UNIT, keys, 0, D)
    if REST > 0:
        _store_part(k_out[1] * grad_scale, grad_k, start, grad_k_n * UNIT, keys, MAIN, D)
        _store_part(v_out[1], grad_v, start, grad_v_n * UNIT, keys, MAIN, D)


SIZE_CLASSES = ("64", "80", "96", "128", "192", "256")


def parts(head_dim: int, dtype: str) -> tuple[int, int]:
    """MAIN and REST, powers of two of at least 16 (REST also 0), that cover the head dimension with the fewest columns."""
    if dtype == "fp32" and head_dim > 192:
        return 128, 128
    main = max(16, 1 << (max(head_dim, 1).bit_length() - 1))
    if main >= head_dim:
        return main, 0
    rest = max(16, triton.next_power_of_2(head_dim - main))
    return (2 * main, 0) if rest >= main else (main, rest)


def size_class(head_dim: int) -> str:
    """Of configs.TABLE's rows: the narrowest that is as wide as the tiles."""
    return next(name for name in SIZE_CLASSES if sum(parts(head_dim, "bf16")) <= int(name))


def _constexprs(head_dim: int, dtype: str, causal: bool, aligned: bool) -> dict[str, int | bool]:
    main, rest = parts(head_dim, dtype)
    return {"D": head_dim, "MAIN": main, "REST": rest, "CAUSAL": causal, "ALIGNED": aligned}


def _layout(*views: torch.Tensor) -> tuple[bool, list[int]]:
    """Whether all strides but the last axis's are whole units of 16 bytes, and these strides in those units."""
    unit = 16 // views[0].element_size()
    strides = [stride for view in views for stride in view.stride()[:3]]
    aligned = all(stride % unit == 0 for stride in strides)
    return aligned, [stride // unit for stride in strides] if aligned else strides


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def forward(q, k, v, causal, prefix_len, scale):
    """q [B,Nq,H,D], k and v [B,Nk,H,D] -> out [B,Nq,H,D], lse [B,H,Nq] float32."""
    q, k, v = map(_unit_stride, (q, k, v))
    batch, queries, heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    aligned, strides = _layout(q, k, v, out)
    config = configs.pick("flash_attention_forward", TYPES[q.dtype], size_class(head_dim))
    grid = batch * heads * cdiv(queries, config.blocks["BLOCK_QUERIES"])
    if grid:
        _flash_attention_forward[(grid,)](
            q, k, v, out, lse, *strides, heads, queries, k.shape[1], prefix_len, _in_units(q.dtype, scale),
            **_constexprs(head_dim, TYPES[q.dtype], causal, aligned), POSITIVE=scale > 0, **config.options,
        )  # fmt: skip
    return out, lse


def backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
    """-> grad_q, grad_k, grad_v, each contiguous."""
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads)
    return grads


def forward_packed(qkv, *rest):
    """`forward` of qkv [B,N,3,H,D], read where it lies."""
    return forward(*qkv.unbind(2), *rest)


def backward_packed(grad_out, qkv, *rest):
    """-> grad_qkv [B,N,3,H,D], into which the kernels write directly."""
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _gradients(grad_out, *qkv.unbind(2), *rest, grad.unbind(2))
    return grad


def _in_units(dtype: torch.dtype, scale: float) -> float:
    return scale if dtype == torch.float32 else scale * math.log2(math.e)


def _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads):
    grad_out, q, k, v, out = map(_unit_stride, (grad_out, q, k, v, out))
    lse = lse.contiguous()
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    grad_q, grad_k, grad_v = grads
    delta = torch.empty_like(lse)
    weight = torch.empty_like(lse) if q.dtype == torch.float32 else delta
    # The softmax of a single score is constant. In float32 grad_k is a sum over q * scale.
    q_scale = scale if keys != 1 else 0.0
    k_scale = q_scale if q.dtype != torch.float32 else float(keys != 1)
    sizes = (heads, queries, keys, prefix_len, _in_units(q.dtype, scale))

    aligned, strides = _layout(grad_out, q, k, v, out, grad_q)
    config = configs.pick("flash_attention_grad_q", TYPES[q.dtype], size_class(head_dim))
    grid = batch * heads * cdiv(queries, config.blocks["BLOCK_QUERIES"])
    if grid:
        _flash_attention_grad_q[(grid,)](
            grad_out, q, k, v, out, lse, grad_q, delta, weight, *strides, *sizes, q_scale,
            **_constexprs(head_dim, TYPES[q.dtype], causal, aligned), **config.options,
        )  # fmt: skip

    aligned, strides = _layout(grad_out, q, k, v, grad_k, grad_v)
    config = configs.pick("flash_attention_grad_kv", TYPES[q.dtype], size_class(head_dim))
    grid = batch * heads * cdiv(keys, config.blocks["BLOCK_KEYS"])
    if grid:
        _flash_attention_grad_kv[(grid,)](
            grad_out, q, k, v, lse, delta, weight, grad_k, grad_v, *strides, *sizes, k_scale,
            **_constexprs(head_dim, TYPES[q.dtype], causal, aligned), **config.options,
        )  # fmt: skip


def traffic(
    kernel: str, dtype: str, batch: int, queries: int, keys: int, heads: int, head_dim: int, causal: bool, prefix_len: int
) -> int:
    """Bytes that a launch moves with the blocks of sm_80. What several programs read counts each time: most of that comes from the L2 cache."""
    blocks = configs.pick(kernel.lstrip("_"), dtype, size_class(head_dim), "sm_80").blocks
    block_queries, block_keys = blocks["BLOCK_QUERIES"], blocks["BLOCK_KEYS"]
    row = head_dim * SIZES[dtype]
    numbers = 4 * (3 if dtype == "fp32" else 2)  # of a query in the backward: lse, delta and perhaps weight

    def visible(query: int) -> int:
        return min(max(query + 1 + keys - queries, prefix_len, 0), keys) if causal else keys

    total = 0
    if kernel.endswith("grad_kv"):
        for start in range(0, keys, block_keys):
            total += 4 * row * min(block_keys, keys - start)
            for query in range(0, queries, block_queries):
                end = min(query + block_queries, queries)
                if visible(end - 1) > start:
                    total += (2 * row + numbers) * (end - query)
        return total * batch * heads
    for query in range(0, queries, block_queries):
        end = min(query + block_queries, queries)
        total += 2 * row * min(cdiv(visible(end - 1), block_keys) * block_keys, keys)
        if kernel.endswith("grad_q"):
            total += (4 * row + numbers) * (end - query) + row * min(block_keys, keys)
        else:
            total += (2 * row + 4) * (end - query)
    return total * batch * heads


# Of the entries: products of head_dim columns for each pair of a query and a key that it sees.
_PRODUCTS = {"_flash_attention_forward": 2, "_flash_attention_grad_q": 3, "_flash_attention_grad_kv": 4}
_BATCH, _LENGTH, _HEADS = 8, 1024, 16


def _work(kernel: str, head_dim: int, causal: bool, dtype: str) -> Work:
    pairs = _LENGTH * (_LENGTH + 1) // 2 if causal else _LENGTH**2
    flops = 2 * _PRODUCTS[kernel] * head_dim * pairs * _BATCH * _HEADS
    return Work(flops, traffic(kernel, dtype, _BATCH, _LENGTH, _LENGTH, _HEADS, head_dim, causal, 0))


_WIDE_HEADS = "two parts of columns and their float32 sums pass 255 registers; no model here has heads wider than 128"


def _entry(kernel, head_dim: int, causal: bool, dtypes: tuple[str, ...]) -> Entry:
    tensors = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
    positive = {"POSITIVE": True} if kernel is _flash_attention_forward else {}
    return Entry(
        kernel=kernel,
        op="flash_attention",
        arguments=argument_types(
            kernel, **dict.fromkeys(tensors, "*{}"), lse="*fp32", delta="*fp32", weight="*fp32", scale="fp32", grad_scale="fp32"
        ),
        problem=f"{_BATCH} x {_LENGTH} queries and keys, {_HEADS} heads of {head_dim}",
        work=functools.partial(_work, kernel.__name__, head_dim, causal),
        constexprs=_constexprs(head_dim, dtypes[0], causal, True) | positive,
        variant=f"D={head_dim}" + (" causal" if causal else ""),
        dtypes=dtypes,
        sizes=(size_class(head_dim),),
        matrix=True,
        exceptions=dict.fromkeys(("stack", "spills"), _WIDE_HEADS) if head_dim > 128 else {},
    )


def entries() -> list[Entry]:
    """Each kernel for the head dimensions of the models, with and without a mask; and for those of the other size classes."""
    cases = [(head_dim, causal, ("bf16", "fp16", "fp32")) for head_dim in (64, 72, 80, 128) for causal in (False, True)]
    cases += [(96, True, ("bf16", "fp32")), (192, True, ("bf16", "fp32")), (256, True, ("bf16",)), (256, True, ("fp32",))]
    kernels = (_flash_attention_forward, _flash_attention_grad_q, _flash_attention_grad_kv)
    return [_entry(kernel, *case) for kernel in kernels for case in cases]
