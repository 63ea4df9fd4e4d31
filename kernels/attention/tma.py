"""Attention's forward with tiles of q, k and v loaded through TMA, for 16-bit tensors on sm_90 and sm_100.

TMA returns 0 for rows and columns beyond a head's, so no load is masked. Each program sets up its own descriptors: with host-side descriptors, which have
axes for batch and head too, Triton 3.9 cannot partition q among warp groups on sm_90.

WARP_SPECIALIZED: Triton partitions the loop over keys into a producer warp group, which loads, and consumers, which multiply. All keys go through one
loop with every tile masked, since on sm_90 a second loop next to a warp-specialized one does not compile. There it needs 4 warps, to which Triton adds 8,
and blocks of 128 queries, half for each consumer: with 8 warps the loop is not partitioned, and with 64 queries the work would be duplicated.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..lib.common import INTERPRETED, rounded
from ..lib.config import has_tma
from .tiles import INF, dot_pv, dot_qk, layout, scaled, softmax_step


@triton.jit
def _descriptors(base, rows, stride, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr):
    """TMA descriptors of a head's rows, one per part of the columns."""
    stride = stride.to(tl.int64)
    main = tl.make_tensor_descriptor(base, [rows, D], [stride, 1], [ROWS, D0])
    if D1 > 0:
        return main, tl.make_tensor_descriptor(base, [rows, D], [stride, 1], [ROWS, D1])
    else:
        return (main,)


@triton.jit
def _load(descriptors, start, D0: tl.constexpr, D1: tl.constexpr):
    main = descriptors[0].load([start, 0])
    if D1 > 0:
        return main, descriptors[1].load([start, D0])
    else:
        return (main,)


@triton.jit
def _attend(
    state, q, k, v, scale, visible, first, last,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_KEYS: tl.constexpr, BORDER: tl.constexpr, POSITIVE: tl.constexpr,
    WARP_SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Accumulates keys [first, last) into the state."""
    out, m_i, l_i = state
    for start in tl.range(first, last, BLOCK_KEYS, warp_specialize=WARP_SPECIALIZED):
        scores = dot_qk(q, _load(k, start, D0, D1), D, D1, 0, visible.shape[0], BLOCK_KEYS)
        if not POSITIVE:
            scores = scores * scale
        if BORDER:
            scores = tl.where((start + tl.arange(0, BLOCK_KEYS))[None, :] < visible[:, None], scores, -INF)
        p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i, scale, False, POSITIVE)
        v_tile = _load(v, start, D0, D1)
        out = dot_pv(rounded(p, q[0].dtype), v_tile, scaled(out, alpha[:, None], D1), D1)
    return out, m_i, l_i


@triton.jit
def attend_tma(
    state, q, k, v, q_n, k_n, v_n, scale, visible, start, queries, keys, border, end,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    POSITIVE: tl.constexpr, WARP_SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Accumulates keys [0, end), masked from `border` on, into (out, m_i, l_i) of the queries from `start` on.

    q, k, v: the head's first rows; q_n, k_n, v_n: row strides in elements.
    """
    q_tile = _load(_descriptors(q, queries, q_n, D, D0, D1, BLOCK_QUERIES), start, D0, D1)
    k = _descriptors(k, keys, k_n, D, D0, D1, BLOCK_KEYS)
    v = _descriptors(v, keys, v_n, D, D0, D1, BLOCK_KEYS)
    if WARP_SPECIALIZED:
        return _attend(state, q_tile, k, v, scale, visible, 0, end, D, D0, D1, BLOCK_KEYS, True, POSITIVE, True)
    else:
        state = _attend(state, q_tile, k, v, scale, visible, 0, border, D, D0, D1, BLOCK_KEYS, False, POSITIVE, False)
        return _attend(state, q_tile, k, v, scale, visible, border, end, D, D0, D1, BLOCK_KEYS, True, POSITIVE, False)


def fits(*views: torch.Tensor) -> bool:
    """Whether TMA can read the views [B,N,H,D] on this device: 16-bit elements, strides and addresses that are multiples of 16 bytes."""
    return (
        (INTERPRETED or has_tma())
        and views[0].element_size() == 2
        and layout(*views)[0]
        and all(view.numel() and view.data_ptr() % 16 == 0 and view.stride(1) > 0 for view in views)
    )


def with_workspace(launch: Callable[[], object], like: torch.Tensor) -> None:
    """Launches with PyTorch's allocator for the descriptors' workspace, which is then freed in stream order or with a CUDA graph's pool.

    Runs in its own context, so that a caller's triton.set_allocator is kept.
    """
    context = contextvars.copy_context()
    context.run(triton.set_allocator, lambda size, alignment, stream: like.new_empty(size, dtype=torch.int8))
    context.run(launch)
