"""Lays out flash_attention's arguments for csrc/cpu/flash_attention.cpp."""

import torch

from .. import _choice, _dispatch
from . import Kernel, empty, empty_like, unavailable_reason, unit_stride, unsupported_reason

FORWARD = Kernel(
    "flash_attention_forward",
    "T* q, int64_t q_batch, int64_t q_row, int64_t q_head, T* k, int64_t k_batch, int64_t k_row, int64_t k_head, T* v, "
    "int64_t v_batch, int64_t v_row, int64_t v_head, T* out, float* lse, int64_t B, int64_t H, int64_t Nq, int64_t Nk, "
    "int64_t D, int64_t causal, int64_t prefix, double scale",
)
BACKWARD = Kernel(
    "flash_attention_backward",
    "T* grad_out, int64_t grad_batch, int64_t grad_row, int64_t grad_head, T* q, int64_t q_batch, int64_t q_row, "
    "int64_t q_head, T* k, int64_t k_batch, int64_t k_row, int64_t k_head, T* v, int64_t v_batch, int64_t v_row, "
    "int64_t v_head, T* out, float* lse, T* grad_q, T* grad_k, T* grad_v, int64_t apart, int64_t B, int64_t H, int64_t Nq, "
    "int64_t Nk, int64_t D, int64_t causal, int64_t prefix, double scale",
)

LARGEST_HEAD = 256


def _sizes(q, k):
    batch, queries, heads, head_dim = q.shape
    return batch, heads, queries, k.shape[1], head_dim


def _forward(q, k, v, causal, prefix_len, scale):
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, queries, *_ = sizes = _sizes(q, k)
    out, lse = empty_like(q), empty(q, (batch, heads, queries), dtype=torch.float32)
    FORWARD(
        q.dtype, q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], out, lse,
        *sizes, causal, prefix_len, float(scale),
    )  # fmt: skip
    return out, lse


def _backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
    grads = empty_like(q), empty_like(k), empty_like(v)
    _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads, q.shape[2] * q.shape[3])
    return grads


def _forward_packed(qkv, *rest):
    return _forward(*unit_stride(qkv).unbind(2), *rest)


def _backward_packed(grad_out, qkv, out, lse, causal, prefix_len, scale):
    qkv = unit_stride(qkv)
    grad = empty_like(qkv)
    q, k, v = qkv.unbind(2)
    _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grad.unbind(2), grad.shape[2:].numel())
    return grad


def _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads, row):
    """Writes dq, dk, dv; their rows are `row` elements apart."""
    grad_out, q, k, v = map(unit_stride, (grad_out, q, k, v))
    BACKWARD(
        q.dtype, grad_out, *grad_out.stride()[:3], q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3],
        out.contiguous(), lse.contiguous(), *grads, row, *_sizes(q, k), causal, prefix_len, float(scale),
    )  # fmt: skip


def _unsupported_reason(q):
    if q.shape[-1] > LARGEST_HEAD:
        return f"head_dim must be at most {LARGEST_HEAD}, got {q.shape[-1]}"
    return unsupported_reason(q)


_dispatch.register(
    "flash_attention", "cpu", _forward, _backward, operands=("q",),
    unavailable_reason=unavailable_reason, unsupported_reason=_unsupported_reason, **_choice.by_evidence("flash_attention"),
)  # fmt: skip
_dispatch.register(
    "flash_attention_qkvpacked", "cpu", _forward_packed, _backward_packed, operands=("qkv",),
    unavailable_reason=unavailable_reason, unsupported_reason=_unsupported_reason,
    **_choice.by_evidence("flash_attention_qkvpacked"),
)  # fmt: skip
