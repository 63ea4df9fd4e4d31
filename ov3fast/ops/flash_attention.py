"""Attention without an N x N tensor kept for the backward.

    s_bhij = scale * sum_d q_bihd k_bjhd        lse_bhi = log sum_{j visible to i} exp(s_bhij)
    p_bhij = exp(s_bhij - lse_bhi) where j is visible to i, else 0
    out_bihd = sum_j p_bhij v_bjhd
    backward: gs_bhij = p_bhij (gp_bhij - sum_j p_bhij gp_bhij) with gp_bhij = sum_d gout_bihd v_bjhd

Key j is visible to query i if not causal, or j <= i + Nk - Nq (aligned bottom-right, FlashAttention-2's rule), or
j < prefix_len. A query that sees no key gives out = 0, lse = -inf and gradients 0.

Shapes: q [B,Nq,H,D], k and v [B,Nk,H,D], out like q, lse [B,H,Nq]. Storage float32, bfloat16 or float64 (float16 on GPUs); scores
and probabilities in float32 (float64 for float64). Saved for backward: q, k, v, out, lse.
Source: Dao 2023 (arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _attention_eager as eager
from . import _check, _choice, _dispatch, _flops, _operator, cpu
from ._calls import Call, Draw


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, prefix_len: int = 0, scale: float | None = None
) -> Tensor:
    """Plain PyTorch, the specification: like PyTorch's math attention, in float32 for 16-bit storage."""
    wide = _check.accumulate_dtype(q.dtype)
    q_BHND, k_BHND, v_BHND = (t.transpose(1, 2).to(wide) for t in (q, k, v))
    scores = q_BHND @ k_BHND.transpose(-1, -2) * _scale(q, scale)
    visible = eager.visible_keys(q.shape[1], k.shape[1], causal, prefix_len, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    probabilities = scores.softmax(-1)
    if visible is not None:
        probabilities = probabilities.masked_fill(~visible, 0.0)
    return (probabilities @ v_BHND).transpose(1, 2).to(q.dtype)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    prefix_len: int = 0,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Softmax attention.

    q: [B, Nq, H, D]; k, v: [B, Nk, H, D]: tokens before heads (PyTorch's SDPA has them the other way round). One dtype: float32, bfloat16
        or float64 (float16 on GPUs); any strides. Cast under torch.autocast.
    causal: query i sees keys up to i + Nk - Nq (aligned bottom-right); the first `prefix_len` keys are seen by all queries even so.
    scale: of the scores; D^-0.5 unless given.
    impl: a backend by name; None picks one.

    Returns [B, Nq, H, D], contiguous, of q's dtype; 0 for a query that sees no key. q, k and v get gradients; no N x N tensor is kept.
    Raises TypeError or ValueError that name the argument. Source: arXiv 2307.08691, algorithms 1 and 2.
    """
    causal = _check.flag("flash_attention", "causal", causal)
    out: Tensor = _flash_attention(impl, q, k, v, causal, prefix_len, _scale(q, scale))[0]
    return out


def flash_attention_qkvpacked(
    qkv: Tensor, *, causal: bool = False, prefix_len: int = 0, scale: float | None = None, impl: str | None = None
) -> Tensor:
    """`flash_attention` of q, k, v = qkv[:, :, 0], [:, :, 1], [:, :, 2], read where they lie; the gradient comes back packed.

    qkv [B,N,3,H,D], with any strides. Returns [B,N,H,D].
    """
    causal = _check.flag("flash_attention_qkvpacked", "causal", causal)
    out: Tensor = _flash_attention_qkvpacked(impl, qkv, causal, prefix_len, _scale(qkv, scale))[0]
    return out


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> None:
    op = "flash_attention"
    _check.tensor(op, "q", q, ndim=4)
    _check.tensor(op, "k", k, ndim=4)
    _check.tensor(op, "v", v, ndim=4)
    keys = (q.shape[0], k.shape[1], *q.shape[2:])
    _check.parameter(op, "k", k, keys, q, "[B,Nk,H,D]")
    _check.parameter(op, "v", v, keys, q, "like k")
    _check_prefix(op, k.shape[1], prefix_len)
    if not _warned and q.shape[2] > q.shape[1] > 1:
        _warn_of_swapped_axes(q)


def _check_packed(qkv: Tensor, causal: bool, prefix_len: int, scale: float) -> None:
    op = "flash_attention_qkvpacked"
    _check.tensor(op, "qkv", qkv, ndim=5)
    if qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must have shape [B,N,3,H,D], got {tuple(qkv.shape)}")
    _check_prefix(op, qkv.shape[1], prefix_len)


_warned = False


def _warn_of_swapped_axes(q: Tensor) -> None:
    """Once, where q looks like [B,H,N,D] made by transposing [B,N,H,D]: more heads than tokens, and heads further apart than tokens."""
    global _warned
    if not torch.compiler.is_compiling() and q.stride(1) < q.stride(2):
        _warned = True
        warnings.warn(
            f"flash_attention takes [B,N,H,D]; q of shape {tuple(q.shape)} has more heads than tokens and strides {q.stride()}, as"
            " [B,H,N,D] has after a transpose. If it is that, pass q.transpose(1, 2), and k and v alike.",
            stacklevel=8,  # the caller of flash_attention in a plain eager call
        )


def _check_prefix(op: str, keys: int, prefix_len: int) -> None:
    if not 0 <= prefix_len <= keys:
        raise ValueError(f"{op}: prefix_len must be between 0 and the number of keys {keys}, got {prefix_len}")


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return float(scale)
    return float(max(q.shape[-1], 1) ** -0.5) if isinstance(q, Tensor) else 1.0  # not a tensor: the check will raise


def register_backend(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any] | None, *,
    unavailable_reason: Callable[[], str | None] = lambda: None,
    unsupported_reason: Callable[..., str | None] = lambda *_: None,
) -> None:  # fmt: skip
    """Registers a backend of `flash_attention` for `flash_attention_qkvpacked` too, which passes it the three views of qkv."""

    def forward_packed(qkv: Tensor, *rest: Any) -> Any:
        return forward(*qkv.unbind(2), *rest)

    def backward_packed(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        assert backward is not None
        return torch.stack(backward(grad_out, *qkv.unbind(2), out, lse, *rest), dim=2)

    def unsupported_reason_packed(qkv: Tensor, *rest: Any) -> str | None:
        return unsupported_reason(*qkv.unbind(2), *rest)

    mask = ("causal", "prefix_len", "scale")
    _dispatch.register(
        "flash_attention", name, forward, backward, operands=("q", "k", "v", *mask),
        unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason,
    )  # fmt: skip
    _dispatch.register(
        "flash_attention_qkvpacked", name, forward_packed, None if backward is None else backward_packed,
        operands=("qkv", *mask), unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason_packed,
    )  # fmt: skip


def _fake(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, ...]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_check.accumulate_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _fake_packed(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(2)
    return _fake(q, k, v, *rest)


def _fake_backward_packed(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _specification(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, ...]:
    return (reference(q, k, v, causal=causal, prefix_len=prefix_len, scale=scale),)


def _specification_packed(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v = qkv.unbind(2)
    return _specification(q, k, v, *rest)


def _differentiable_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _operator.gradients(lambda *qkv: _specification(*qkv, *rest)[0], (q, k, v), grad_out)


def _differentiable_backward_packed(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    return _operator.gradients(lambda qkv: _specification_packed(qkv, *rest)[0], (qkv,), grad_out)[0]


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    *tensors, causal, prefix_len, scale = inputs
    return _operator.Saved((*tensors, *output), (causal, prefix_len, scale), constants=output[1:])


register_backend("eager", eager.forward, eager.backward)
_flash_attention = _operator.define(
    "flash_attention",
    "(Tensor q, Tensor k, Tensor v, bool causal, SymInt prefix_len, float scale) -> (Tensor out, Tensor lse)",
    fake=_fake,
    check=_check_arguments,
    autocast=("q", "k", "v"),
    specification=_specification,
    save=_save,
    gradients={"q": 0, "k": 1, "v": 2},
    backward_schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " bool causal, SymInt prefix_len, float scale) -> (Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
)
_flash_attention_qkvpacked = _operator.define(
    "flash_attention_qkvpacked",
    "(Tensor qkv, bool causal, SymInt prefix_len, float scale) -> (Tensor out, Tensor lse)",
    fake=_fake_packed,
    check=_check_packed,
    autocast=("qkv",),
    specification=_specification_packed,
    save=_save,
    gradients={"qkv": 0},
    backward_schema="(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, bool causal, SymInt prefix_len, float scale)"
    " -> Tensor",
    backward_fake=_fake_backward_packed,
    differentiable_backward=_differentiable_backward_packed,
)


# ---- its products, for FlopCounterMode


def _flops_forward(q: _flops.Shape, k: _flops.Shape, *_: Any) -> int:
    """q k^T and p v."""
    batch, queries, heads, width = q
    return 4 * batch * heads * queries * k[1] * width


def _flops_backward(grad_out: Any, q: _flops.Shape, k: _flops.Shape, *_: Any) -> int:
    """q k^T again, and the products for dv, dp, dq and dk."""
    return 5 * _flops_forward(q, k) // 2


def _unpacked(qkv: _flops.Shape) -> tuple[_flops.Shape, _flops.Shape]:
    one = (*qkv[:2], *qkv[3:])
    return one, one


def _flops_qkvpacked(qkv: _flops.Shape, *_: Any) -> int:
    return _flops_forward(*_unpacked(qkv))


def _flops_qkvpacked_backward(grad_out: Any, qkv: _flops.Shape, *_: Any) -> int:
    return _flops_backward(grad_out, *_unpacked(qkv))


_flops.counts("flash_attention", _flops_forward, _flops_backward)
_flops.counts("flash_attention_qkvpacked", _flops_qkvpacked, _flops_qkvpacked_backward)


# ---- the CPU kernels, csrc/cpu/flash_attention.cpp

_FORWARD = cpu.Kernel(
    "flash_attention_forward",
    "T* q, int64_t q_batch, int64_t q_row, int64_t q_head, T* k, int64_t k_batch, int64_t k_row, int64_t k_head, T* v, "
    "int64_t v_batch, int64_t v_row, int64_t v_head, T* out, float* lse, int64_t B, int64_t H, int64_t Nq, int64_t Nk, "
    "int64_t D, int64_t causal, int64_t prefix, double scale",
)
_BACKWARD = cpu.Kernel(
    "flash_attention_backward",
    "T* grad_out, int64_t grad_batch, int64_t grad_row, int64_t grad_head, T* q, int64_t q_batch, int64_t q_row, "
    "int64_t q_head, T* k, int64_t k_batch, int64_t k_row, int64_t k_head, T* v, int64_t v_batch, int64_t v_row, "
    "int64_t v_head, T* out, float* lse, T* grad_q, T* grad_k, T* grad_v, int64_t apart, int64_t B, int64_t H, int64_t Nq, "
    "int64_t Nk, int64_t D, int64_t causal, int64_t prefix, double scale",
)

LARGEST_HEAD = 256


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    batch, queries, heads, head_dim = q.shape
    return batch, heads, queries, k.shape[1], head_dim


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, ...]:
    q, k, v = map(cpu.unit_stride, (q, k, v))
    batch, heads, queries, *_ = sizes = _sizes(q, k)
    out, lse = cpu.empty_like(q), cpu.empty(q, (batch, heads, queries), dtype=torch.float32)
    _FORWARD(
        q.dtype, q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], out, lse,
        *sizes, causal, prefix_len, float(scale),
    )  # fmt: skip
    return out, lse


def _backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> tuple[Tensor, ...]:
    grads = cpu.empty_like(q), cpu.empty_like(k), cpu.empty_like(v)
    _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grads, q.shape[2] * q.shape[3])
    return grads


def _forward_packed_cpu(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    q, k, v = cpu.unit_stride(qkv).unbind(2)
    return _forward_cpu(q, k, v, *rest)


def _backward_packed_cpu(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> Tensor:
    qkv = cpu.unit_stride(qkv)
    grad = cpu.empty_like(qkv)
    q, k, v = qkv.unbind(2)
    _gradients(grad_out, q, k, v, out, lse, causal, prefix_len, scale, grad.unbind(2), grad.shape[2:].numel())
    return grad


def _gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float,
    grads: Sequence[Tensor], row: int,
) -> None:  # fmt: skip
    """Writes dq, dk and dv into `grads`, whose row stride is `row` elements."""
    grad_out, q, k, v = map(cpu.unit_stride, (grad_out, q, k, v))
    _BACKWARD(
        q.dtype, grad_out, *grad_out.stride()[:3], q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3],
        out.contiguous(), lse.contiguous(), *grads, row, *_sizes(q, k), causal, prefix_len, float(scale),
    )  # fmt: skip


def _unsupported_reason(q: Tensor) -> str | None:
    if q.shape[-1] > LARGEST_HEAD:
        return f"head_dim must be at most {LARGEST_HEAD}, got {q.shape[-1]}"
    return cpu.unsupported_reason(q)


cpu.register(
    "flash_attention", _forward_cpu, _backward_cpu, operands=("q",), unsupported_reason=_unsupported_reason,
    **_choice.by_evidence(
        "flash_attention", "sequences x heads, queries, head_dim",
        lambda q: (q, None, (q.shape[0] * q.shape[2], q.shape[1], q.shape[3])), products="sdpa",
    ),
)  # fmt: skip
cpu.register(
    "flash_attention_qkvpacked", _forward_packed_cpu, _backward_packed_cpu, operands=("qkv",), unsupported_reason=_unsupported_reason,
    **_choice.by_evidence(
        "flash_attention_qkvpacked", "flash_attention",
        lambda qkv: (qkv, None, (qkv.shape[0] * qkv.shape[3], qkv.shape[1], qkv.shape[4])),
    ),
)  # fmt: skip


# ---- how it is called


def _qkv(draw: Draw, batch: int, queries: int, keys: int, heads: int, head_dim: int) -> list[Tensor]:
    return [draw(batch, queries, heads, head_dim), draw(batch, keys, heads, head_dim), draw(batch, keys, heads, head_dim)]


CALLS = [
    Call(
        "flash_attention", flash_attention, reference, _qkv, least=(1, 4, 3, 2, 3), tiny=(1, 70, 90, 2, 24), real=(8, 1024, 1024, 12, 64),
        measured=((108, 17, 17, 4, 64), (24, 256, 256, 4, 64), (4, 1024, 1024, 4, 64)),
        counted=lambda batch, queries, keys, heads, head_dim: (batch * heads, queries, head_dim),
    ),
    Call(
        "flash_attention", flash_attention, reference, _qkv, label="causal", apply=lambda f, q, k, v: f(q, k, v, causal=True, prefix_len=5),
        least=(1, 4, 7, 2, 3), tiny=(2, 130, 140, 1, 72), real=(4, 777, 1029, 8, 72),
    ),
    Call(
        "flash_attention_qkvpacked", flash_attention_qkvpacked, lambda qkv: reference(*qkv.unbind(2)),
        lambda draw, batch, tokens, heads, head_dim: [draw(batch, tokens, 3, heads, head_dim)],
        least=(1, 4, 2, 3), tiny=(2, 75, 2, 16), real=(16, 257, 12, 64),
    ),
]  # fmt: skip
