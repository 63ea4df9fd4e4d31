"""flash_attention: launches the kernels, with the signatures of the operator's reference."""

from __future__ import annotations

import functools

import torch

from ..lib.common import TYPES, cdiv
from ..lib.config import pick
from ..lib.rows import empty
from .backward import flash_attention_grad_kv, flash_attention_grad_q
from .forward import flash_attention_forward
from .tiles import constexprs, in_units, layout, size_class, unit_stride
from .tma import fits, with_workspace


def forward(q, k, v, causal, prefix_len, scale):
    """q [B,Nq,H,D], k and v [B,Nk,H,D] -> out [B,Nq,H,D], lse [B,H,Nq] float32."""
    q, k, v = map(unit_stride, (q, k, v))
    batch, queries, heads, head_dim = q.shape
    out, lse = empty(q, q.shape), empty(q, (batch, heads, queries), dtype=torch.float32)
    aligned, strides = layout(q, k, v, out)
    asked = "flash_attention_forward", TYPES[q.dtype], size_class(head_dim)
    config = pick(*asked)
    if config.blocks["TMA"] and not fits(q, k, v):
        config = pick(*asked, tuned=False)
    grid = batch * heads * cdiv(queries, config.blocks["BLOCK_QUERIES"])
    if grid:
        launch = functools.partial(
            flash_attention_forward[(grid,)],
            q, k, v, out, lse, *strides, heads, queries, k.shape[1], prefix_len, in_units(q.dtype, scale),
            **constexprs(head_dim, TYPES[q.dtype], causal, aligned), POSITIVE=scale > 0, **config.options,
        )  # fmt: skip
        with_workspace(launch, q) if config.blocks["TMA"] else launch()
    return out, lse


def forward_packed(qkv, *rest):
    """`forward` of qkv [B,N,3,H,D], read in place."""
    return forward(*qkv.unbind(2), *rest)


def backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
    """-> grad_q, grad_k, grad_v, each contiguous."""
    grads = tuple(empty(t, t.shape) for t in (q, k, v))
    _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads)
    return grads


def backward_packed(grad_out, qkv, *rest):
    """-> grad_qkv [B,N,3,H,D], which the kernels write directly."""
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _gradients(grad_out, *qkv.unbind(2), *rest, grad.unbind(2))
    return grad


def _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads):
    grad_out, q, k, v, out = map(unit_stride, (grad_out, q, k, v, out))
    lse = lse.contiguous()
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    grad_q, grad_k, grad_v = grads
    delta = torch.empty_like(lse)
    weight = torch.empty_like(lse) if q.dtype == torch.float32 else delta
    # The softmax of a single score is constant. In float32 grad_k sums over q * scale.
    q_scale = scale if keys != 1 else 0.0
    k_scale = q_scale if q.dtype != torch.float32 else float(keys != 1)
    sizes = (heads, queries, keys, prefix_len, in_units(q.dtype, scale))

    aligned, strides = layout(grad_out, q, k, v, out, grad_q)
    config = pick("flash_attention_grad_q", TYPES[q.dtype], size_class(head_dim))
    grid = batch * heads * cdiv(queries, config.blocks["BLOCK_QUERIES"])
    if grid:
        flash_attention_grad_q[(grid,)](
            grad_out, q, k, v, out, lse, grad_q, delta, weight, *strides, *sizes, q_scale,
            **constexprs(head_dim, TYPES[q.dtype], causal, aligned), **config.options,
        )  # fmt: skip

    aligned, strides = layout(grad_out, q, k, v, grad_k, grad_v)
    config = pick("flash_attention_grad_kv", TYPES[q.dtype], size_class(head_dim))
    grid = batch * heads * cdiv(keys, config.blocks["BLOCK_KEYS"])
    if grid:
        flash_attention_grad_kv[(grid,)](
            grad_out, q, k, v, lse, delta, weight, grad_k, grad_v, *strides, *sizes, k_scale,
            **constexprs(head_dim, TYPES[q.dtype], causal, aligned), **config.options,
        )  # fmt: skip
