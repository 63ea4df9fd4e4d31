"""Attention's forward: online softmax, one program per block of queries of one head.

Blocks of keys that no query of the block sees are skipped; only blocks on the mask's edge are masked. For 16-bit dtypes scores are in units of
log 2; float32 uses q * scale and exp, as PyTorch does, so that the probability of a single key is exactly 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..lib.common import rounded
from ..lib.launch import kernel
from .tiles import (
    INF,
    LN_2,
    dot_pv,
    dot_qk,
    load,
    operand,
    plain,
    scaled,
    softmax_step,
    store_part,
    visible_keys,
    zeros,
)
from .tma import attend_tma


@triton.jit
def _attend(
    state, q, k, v, k_n, v_n, scale, visible, keys, first, last,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, STEP: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BORDER: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    """Accumulates keys [first, last) into (out, m_i, l_i); m_i is unscaled if POSITIVE."""
    out, m_i, l_i = state
    DTYPE: tl.constexpr = v.dtype.element_ty
    EXACT: tl.constexpr = DTYPE == tl.float32
    for start in tl.range(first, last, BLOCK_KEYS, disable_licm=STEP > 0):
        k_rows = operand(k, start, k_n, keys, 1.0, D, D0, D1, STEP, BLOCK_KEYS, BORDER)
        scores = dot_qk(q, k_rows, D, D1, STEP, visible.shape[0], BLOCK_KEYS)
        if not EXACT and not POSITIVE:
            scores = scores * scale
        if BORDER:
            scores = tl.where((start + tl.arange(0, BLOCK_KEYS))[None, :] < visible[:, None], scores, -INF)
        p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i, scale, EXACT, POSITIVE)
        v_tile = load(v, start, v_n, keys, D, D0, D1, BLOCK_KEYS, BORDER)
        out = dot_pv(rounded(p, DTYPE), v_tile, scaled(out, alpha[:, None], D1), D1)
    return out, m_i, l_i


@kernel(do_not_specialize=plain("q", "k", "v", "out"))
def flash_attention_forward(
    q, k, v, out, lse,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h,
    heads, queries, keys, prefix_len, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CAUSAL: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr,
    POSITIVE: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head per program. scale: in units of log 2 for 16-bit dtypes; POSITIVE: scale > 0.

    TMA, WARP_SPECIALIZED: see tma.py; 16-bit dtypes only.
    """
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
    visible = visible_keys(row, queries, keys, prefix_len, CAUSAL)
    border = visible_keys(start, queries, keys, prefix_len, CAUSAL) // BLOCK_KEYS * BLOCK_KEYS
    end = visible_keys(tl.minimum(start + BLOCK_QUERIES, queries) - 1, queries, keys, prefix_len, CAUSAL)

    state = (
        zeros(BLOCK_QUERIES, D0, D1),
        tl.full([BLOCK_QUERIES], -INF, tl.float32),
        tl.zeros([BLOCK_QUERIES], tl.float32),
    )
    if TMA:
        state = attend_tma(
            state, q, k, v, q_n * UNIT, k_n * UNIT, v_n * UNIT, scale, visible, start, queries, keys, border, end,
            D, D0, D1, BLOCK_QUERIES, BLOCK_KEYS, POSITIVE, WARP_SPECIALIZED,
        )  # fmt: skip
    else:
        q_rows = operand(q, start, q_n * UNIT, queries, scale, D, D0, D1, STEP, BLOCK_QUERIES, True)
        state = _attend(
            state, q_rows, k, v, k_n * UNIT, v_n * UNIT, scale, visible, keys, 0, border,
            D, D0, D1, STEP, BLOCK_KEYS, False, POSITIVE,
        )  # fmt: skip
        state = _attend(
            state, q_rows, k, v, k_n * UNIT, v_n * UNIT, scale, visible, keys, border, end,
            D, D0, D1, STEP, BLOCK_KEYS, True, POSITIVE,
        )  # fmt: skip

    out_tile, m_i, l_i = state
    shift = tl.where(tl.abs(m_i) == INF, 0.0, m_i)
    if DTYPE == tl.float32:
        logarithm = shift + tl.log(l_i)
    elif POSITIVE:
        logarithm = (shift * scale + tl.log2(l_i)) * LN_2
    else:
        logarithm = (shift + tl.log2(l_i)) * LN_2
    tl.store(lse + head.to(tl.int64) * queries + row, logarithm, mask=row < queries)
    blind = (visible == 0)[:, None]
    inverse = (1.0 / l_i)[:, None]
    store_part(tl.where(blind, 0.0, out_tile[0] * inverse), out, start, out_n * UNIT, queries, 0, D)
    if D1 > 0:
        store_part(tl.where(blind, 0.0, out_tile[1] * inverse), out, start, out_n * UNIT, queries, D0, D)
