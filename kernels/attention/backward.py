"""Attention's backward: one kernel over query blocks, then one over key blocks; no atomics.

The kernel over query blocks computes delta_i = sum_d gout_id out_id from a rounded out, which shifts every gs_ij of a row: they no longer sum to 0,
and if the keys share a large offset, the error far exceeds the budget. So it sums the rounded gs_ij, subtracts that sum times the mean of the
first keys from grad_q (a common offset of the keys does not contribute to the exact gradient), and adds it to delta for grad_k. In float32 the
rounding of lse matters as well; weight_i = 1 / sum_j p_ij corrects it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..lib.common import rounded
from ..lib.launch import kernel
from .tiles import (
    INF,
    LOG2_E,
    dot_pv,
    dot_qk,
    load,
    load_tile,
    operand,
    plain,
    scaled,
    store_part,
    visible_keys,
    zeros,
)


@triton.jit
def _query_gradient(
    state, q, grad_out, k, v, k_n, v_n, lse, delta, scale, visible, keys, first, last,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, STEP: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BORDER: tl.constexpr,
):  # fmt: skip
    """Adds keys [first, last) to (sum_j gs_ij k_j, sum_j gs_ij, sum_j p_ij)."""
    grad_q, excess, mass = state
    DTYPE: tl.constexpr = k.dtype.element_ty
    EXACT: tl.constexpr = DTYPE == tl.float32
    for start in tl.range(first, last, BLOCK_KEYS, disable_licm=STEP > 0):
        k_rows = operand(k, start, k_n, keys, 1.0, D, D0, D1, STEP, BLOCK_KEYS, BORDER)
        v_rows = operand(v, start, v_n, keys, 1.0, D, D0, D1, STEP, BLOCK_KEYS, BORDER)
        scores = dot_qk(q, k_rows, D, D1, STEP, visible.shape[0], BLOCK_KEYS)
        if EXACT:
            p = tl.exp(scores - lse[:, None])
        else:
            p = tl.exp2(tl.fma(scores, scale, -lse[:, None]))
        if BORDER:
            p = tl.where((start + tl.arange(0, BLOCK_KEYS))[None, :] < visible[:, None], p, 0.0)
        if EXACT:
            mass += tl.sum(p, 1)
        grad_p = dot_qk(grad_out, v_rows, D, D1, STEP, visible.shape[0], BLOCK_KEYS)
        grad_s = rounded(p * (grad_p - delta[:, None]), DTYPE)
        excess += tl.sum(grad_s.to(tl.float32), 1)
        grad_q = dot_pv(grad_s, load_tile(k_rows, D, D0, D1, STEP, BLOCK_KEYS, BORDER), grad_q, D1)
    return grad_q, excess, mass


@triton.jit
def _row_sums(a, b, D1: tl.constexpr):
    """sum_d a_id b_id."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


@kernel(do_not_specialize=plain("grad_out", "q", "k", "v", "out", "grad_q"))
def flash_attention_grad_q(
    grad_out, q, k, v, out, lse, grad_q, delta, weight,
    grad_out_b, grad_out_n, grad_out_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h, grad_q_b, grad_q_n, grad_q_h,
    heads, queries, keys, prefix_len, scale, grad_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head per program: grad_q, delta and, for float32, weight."""
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
    visible = visible_keys(row, queries, keys, prefix_len, CAUSAL)
    border = visible_keys(start, queries, keys, prefix_len, CAUSAL) // BLOCK_KEYS * BLOCK_KEYS
    end = visible_keys(tl.minimum(start + BLOCK_QUERIES, queries) - 1, queries, keys, prefix_len, CAUSAL)

    grad_rows = operand(grad_out, start, grad_out_n * UNIT, queries, 1.0, D, D0, D1, STEP, BLOCK_QUERIES, True)
    out_tile = load(out, start, out_n * UNIT, queries, D, D0, D1, BLOCK_QUERIES, True)
    delta_row = _row_sums(load_tile(grad_rows, D, D0, D1, STEP, BLOCK_QUERIES, True), out_tile, D1)
    q_rows = operand(q, start, q_n * UNIT, queries, scale, D, D0, D1, STEP, BLOCK_QUERIES, True)
    # Rows past the end get probabilities 0.
    lse_row = tl.load(lse + row, mask=row < queries, other=INF)
    if DTYPE != tl.float32:
        lse_row = lse_row * LOG2_E
    nothing = tl.zeros([BLOCK_QUERIES], tl.float32)
    state = (zeros(BLOCK_QUERIES, D0, D1), nothing, nothing)
    state = _query_gradient(
        state, q_rows, grad_rows, k, v, k_n * UNIT, v_n * UNIT, lse_row, delta_row, scale, visible, keys, 0, border,
        D, D0, D1, STEP, BLOCK_KEYS, False,
    )  # fmt: skip
    state = _query_gradient(
        state, q_rows, grad_rows, k, v, k_n * UNIT, v_n * UNIT, lse_row, delta_row, scale, visible, keys, border, end,
        D, D0, D1, STEP, BLOCK_KEYS, True,
    )  # fmt: skip

    grad_tile, excess, mass = state
    if DTYPE == tl.float32:
        inverse = tl.where(mass > 0, 1.0 / mass, 1.0)
        tl.store(weight + row, inverse, mask=row < queries)
        excess = excess * inverse
        grad_tile = scaled(grad_tile, inverse[:, None], D1)
    # Keep an infinite gradient infinite.
    excess = tl.where(tl.abs(excess) < INF, excess, 0.0)
    tl.store(delta + row, delta_row + excess, mask=row < queries)
    first_keys = load(k, start * 0, k_n * UNIT, keys, D, D0, D1, BLOCK_KEYS, True)
    count = tl.maximum(tl.minimum(keys, BLOCK_KEYS), 1).to(tl.float32)
    mean = tl.sum(first_keys[0].to(tl.float32), 0) / count
    main = (grad_tile[0] - excess[:, None] * mean[None, :]) * grad_scale
    store_part(main, grad_q, start, grad_q_n * UNIT, queries, 0, D)
    if D1 > 0:
        mean = tl.sum(first_keys[1].to(tl.float32), 0) / count
        rest = (grad_tile[1] - excess[:, None] * mean[None, :]) * grad_scale
        store_part(rest, grad_q, start, grad_q_n * UNIT, queries, D0, D)


@triton.jit
def _key_gradients(
    state, k, v, grad_out, q, grad_out_n, q_n, lse, delta, weight, scale, key, queries, keys, prefix_len, first, last,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, STEP: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BORDER: tl.constexpr,
):  # fmt: skip
    """Adds queries [first, last) to (grad_k, grad_v). Scores are laid out keys x queries, so that no product needs a transpose."""
    grad_k, grad_v = state
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    for start in tl.range(first, last, BLOCK_QUERIES, disable_licm=STEP > 0):
        row = start + tl.arange(0, BLOCK_QUERIES)
        q_rows = operand(q, start, q_n, queries, scale, D, D0, D1, STEP, BLOCK_QUERIES, True)
        grad_rows = operand(grad_out, start, grad_out_n, queries, 1.0, D, D0, D1, STEP, BLOCK_QUERIES, True)
        # Rows past the end get probability 0.
        lse_row = tl.load(lse + row, mask=row < queries, other=INF)
        delta_row = tl.load(delta + row, mask=row < queries, other=0.0)
        scores = dot_qk(k, q_rows, D, D1, STEP, key.shape[0], BLOCK_QUERIES)
        if EXACT:
            weight_row = tl.load(weight + row, mask=row < queries, other=1.0)
            p = tl.exp(scores - lse_row[None, :]) * weight_row[None, :]
        else:
            lse_row = lse_row * LOG2_E
            p = tl.exp2(tl.fma(scores, scale, -lse_row[None, :]))
        if BORDER:
            visible = visible_keys(row, queries, keys, prefix_len, True)
            p = tl.where(key[:, None] < visible[None, :], p, 0.0)
        grad_tile = load_tile(grad_rows, D, D0, D1, STEP, BLOCK_QUERIES, True)
        grad_v = dot_pv(rounded(p, q.dtype.element_ty), grad_tile, grad_v, D1)
        grad_p = dot_qk(v, grad_rows, D, D1, STEP, key.shape[0], BLOCK_QUERIES)
        grad_s = rounded(p * (grad_p - delta_row[None, :]), q.dtype.element_ty)
        grad_k = dot_pv(grad_s, load_tile(q_rows, D, D0, D1, STEP, BLOCK_QUERIES, True), grad_k, D1)
    return grad_k, grad_v


@kernel(do_not_specialize=plain("grad_out", "q", "k", "v", "grad_k", "grad_v"))
def flash_attention_grad_kv(
    grad_out, q, k, v, lse, delta, weight, grad_k, grad_v,
    grad_out_b, grad_out_n, grad_out_h, q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    grad_k_b, grad_k_n, grad_k_h, grad_v_b, grad_v_n, grad_v_h,
    heads, queries, keys, prefix_len, scale, grad_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys of one head per program: grad_k and grad_v."""
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
    k_rows = operand(k, start, k_n * UNIT, keys, 1.0, D, D0, D1, STEP, BLOCK_KEYS, True)
    v_rows = operand(v, start, v_n * UNIT, keys, 1.0, D, D0, D1, STEP, BLOCK_KEYS, True)
    state = (zeros(BLOCK_KEYS, D0, D1), zeros(BLOCK_KEYS, D0, D1))
    border = start * 0
    if CAUSAL:
        # The first query that sees the block's first key, and the first that sees all of its keys; all queries see the prefix.
        last_key = tl.minimum(start + BLOCK_KEYS, keys) - 1
        first = tl.where(start < prefix_len, 0, tl.maximum(start + queries - keys, 0)) // BLOCK_QUERIES * BLOCK_QUERIES
        border = tl.where(last_key < prefix_len, 0, tl.maximum(last_key + queries - keys, 0))
        border = tl.minimum(tl.cdiv(border, BLOCK_QUERIES) * BLOCK_QUERIES, queries)
        state = _key_gradients(
            state, k_rows, v_rows, grad_out, q, grad_out_n * UNIT, q_n * UNIT, lse, delta, weight, scale, key, queries, keys, prefix_len,
            first, border, D, D0, D1, STEP, BLOCK_QUERIES, True,
        )  # fmt: skip
    state = _key_gradients(
        state, k_rows, v_rows, grad_out, q, grad_out_n * UNIT, q_n * UNIT, lse, delta, weight, scale, key, queries, keys, prefix_len,
        border, queries, D, D0, D1, STEP, BLOCK_QUERIES, False,
    )  # fmt: skip
    k_out, v_out = state
    store_part(k_out[0] * grad_scale, grad_k, start, grad_k_n * UNIT, keys, 0, D)
    store_part(v_out[0], grad_v, start, grad_v_n * UNIT, keys, 0, D)
    if D1 > 0:
        store_part(k_out[1] * grad_scale, grad_k, start, grad_k_n * UNIT, keys, D0, D)
        store_part(v_out[1], grad_v, start, grad_v_n * UNIT, keys, D0, D)
