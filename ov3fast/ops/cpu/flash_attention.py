"""Lays out flash_attention's arguments for csrc/cpu/flash_attention.cpp."""

import torch

from .. import _dispatch
from . import missing, refuses, run, unit_stride

LARGEST_HEAD = 256


def _sizes(q, k):
    batch, queries, heads, head_dim = q.shape
    return batch, heads, queries, k.shape[1], head_dim


def _forward(q, k, v, causal, prefix_len, scale):
    q, k, v = map(unit_stride, (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    run(
        "flash_attention_forward", q.dtype, q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], out, lse,
        *_sizes(q, k), causal, prefix_len, float(scale),
    )  # fmt: skip
    return out, lse


def _backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads, q.shape[2] * q.shape[3])
    return grads


def _forward_packed(qkv, *rest):
    return _forward(*unit_stride(qkv).unbind(2), *rest)


def _backward_packed(grad_out, qkv, *rest):
    qkv = unit_stride(qkv)
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _gradients(grad_out, *qkv.unbind(2), *rest, grad.unbind(2), grad.shape[2:].numel())
    return grad


def _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads, row):
    """Writes dq, dk, dv; their rows are `row` elements apart."""
    tensors = [unit_stride(t) for t in (grad_out, q, k, v)]
    views = [part for t in tensors for part in (t, *t.stride()[:3])]
    run(
        "flash_attention_backward", q.dtype, *views, out.contiguous(), lse.contiguous(), *grads, row,
        *_sizes(q, k), causal, prefix_len, float(scale),
    )  # fmt: skip


def _refuses(q, k, v, *_):
    if q.shape[-1] > LARGEST_HEAD:
        return f"head_dim must be at most {LARGEST_HEAD}, got {q.shape[-1]}"
    return refuses(q, k, v)


_dispatch.register(
    "flash_attention", "cpu", _forward, _backward, missing=missing, refuses=_refuses,
    refuses_backward=lambda grad_out, q, k, v, *_: _refuses(q, k, v),
)  # fmt: skip
_dispatch.register(
    "flash_attention_qkvpacked", "cpu", _forward_packed, _backward_packed, missing=missing,
    refuses=lambda qkv, *_: _refuses(qkv, qkv, qkv),
    refuses_backward=lambda grad_out, qkv, *_: _refuses(qkv, qkv, qkv),
)  # fmt: skip
