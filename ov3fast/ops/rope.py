"""Rotary positions for the q and k of attention, with RMS norm of both before it where weights are given.

    q~_bnhp = q_bnhp rstd(q_bnh) wq_p,   rstd = 1 / sqrt(mean_p q_bnhp^2 + eps)              (q~ = q without weights); k alike
    q'_bnh(2i)   = q~_bnh(2i) cos_ni - q~_bnh(2i+1) sin_ni
    q'_bnh(2i+1) = q~_bnh(2i) sin_ni + q~_bnh(2i+1) cos_ni;   v' = v

    dq~ is dq' turned back (sin -> -sin); dq and dwq by the formulas of rms_norm over p.

Shapes: qkv [B, N, 3, H, P], as one product gives it; cos, sin [N, P / 2]; q_weight, k_weight [P]; result [B, N, 3, H, P], contiguous: the operand of
`flash_attention_qkvpacked`, whose backward hands its gradient back in one piece. v is copied for that. It costs a third of the pass, and
spares the backward of a split into q, k and v, which reads and writes all three. Positions of any number of dimensions are in cos and sin: in two, half
of the angles are the row's and half the column's.
Storage float32, bfloat16 or float64 (float16 on GPUs); arithmetic in float32 (float64 for float64), rounded once. cos, sin and the weights are of qkv's
dtype or float32; give cos and sin in float32. Saved for backward: cos and sin; with weights qkv and these too, and the norms are computed again.
Source: Su et al. 2021 (arXiv 2104.09864), eq. 34; Heo et al. 2024 (arXiv 2403.13298) in two dimensions; RMS norm of q and k: Dehghani et
al. 2023 (arXiv 2302.05442), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check, _choice, _dispatch, _operator, cpu
from ._calls import Call
from .rms_norm import _backward_eager as _norm_backward
from .rms_norm import reference as _norm


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Plain PyTorch, the specification."""
    wide = _check.accumulate_dtype(qkv.dtype)
    q, k, v = qkv.unbind(2)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    q, k = (x.to(wide) for x in (q, k))
    if q_weight is not None and k_weight is not None:
        q, k = _norm(q, q_weight, eps), _norm(k, k_weight, eps)
    q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    return torch.stack([q.to(qkv.dtype), k.to(qkv.dtype), v], 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> Tensor:
    """qkv [B, N, 3, H, P] with q and k normalised, where weights [P] are given, and turned by the angles of cos and sin [N, P / 2].

    Neighbouring channels (2i, 2i + 1) turn together. q_weight and k_weight: both or none. qkv and the weights get gradients, cos and sin none.
    Returns a contiguous tensor of qkv's shape and dtype, for `flash_attention_qkvpacked`. Raises TypeError or ValueError that name the
    argument.
    """
    if getattr(cos, "requires_grad", False) or getattr(sin, "requires_grad", False):
        raise ValueError("rope: cos and sin get no gradients; detach them")
    y: Tensor = _rope(impl, qkv, cos, sin, q_weight, k_weight, eps)
    return y


def _check_arguments(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> None:
    op = "rope"
    _check.tensor(op, "qkv", qkv, ndim=5)
    if qkv.shape[2] != 3 or qkv.shape[4] % 2:
        raise ValueError(f"{op}: qkv must be [B, N, 3, H, P] with an even P, got shape {tuple(qkv.shape)}")
    tokens, width = qkv.shape[1], qkv.shape[4]
    for name, angles in (("cos", cos), ("sin", sin)):
        _check.tensor(op, name, angles)
        _check.parameter(op, name, angles, (tokens, width // 2), qkv, "[N, P / 2]", mixed=True)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: q_weight and k_weight must both be given, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _check.parameter(op, name, weight, (width,), qkv, "[P]", mixed=True)
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise TypeError(f"{op}: k_weight must be of q_weight's dtype {q_weight.dtype}, got {k_weight.dtype}")


def _backward_eager(
    grad_y: Tensor, cos: Tensor, sin: Tensor, qkv: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    need_qkv: bool, need_q_weight: bool, need_k_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = _check.accumulate_dtype(grad_y.dtype)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    grads = [_turned(grad.to(wide), cos, -sin) for grad in grad_y.unbind(2)[:2]]
    none = grad_y.new_empty(0)
    of_weights = [none, none]
    if qkv is not None and q_weight is not None and k_weight is not None:
        weights = (q_weight, need_q_weight), (k_weight, need_k_weight)
        for i, (weight, need) in enumerate(weights):
            grads[i], of_weights[i] = _norm_backward(grads[i], None, qkv[:, :, i].to(wide), weight, eps, need_qkv, need)
    grad_qkv = torch.stack([*(grad.to(grad_y.dtype) for grad in grads), grad_y[:, :, 2]], 2) if need_qkv else none
    return grad_qkv, *of_weights


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _fake_backward(
    grad_y: Tensor, cos: Tensor, sin: Tensor, qkv: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    need_qkv: bool, need_q_weight: bool, need_k_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights = (
        grad_y.new_empty(0) if weight is None else weight.new_empty(weight.shape if need else 0)
        for weight, need in ((q_weight, need_q_weight), (k_weight, need_k_weight))
    )
    return grad_y.new_empty(grad_y.shape if need_qkv else 0), *weights


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    qkv, cos, sin, q_weight, k_weight, eps = inputs
    return _operator.Saved((cos, sin, None if q_weight is None else qkv, q_weight, k_weight), (eps,))


_dispatch.register("rope", "eager", reference, _backward_eager, differentiable=lambda *_: lambda *inputs: reference(*inputs))
_rope = _operator.define(
    "rope",
    "(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps) -> Tensor",
    fake=_fake,
    check=_check_arguments,
    specification=reference,
    save=_save,
    gradients={"qkv": 0, "q_weight": 1, "k_weight": 2},
    # The gradient goes by the name of what it is like: backends look at qkv, which itself is not kept where nothing is normalised.
    backward_schema="(Tensor qkv, Tensor cos, Tensor sin, Tensor? normalised, Tensor? q_weight, Tensor? k_weight, float eps,"
    " bool need_qkv, bool need_q_weight, bool need_k_weight) -> (Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_backward_eager,  # plain PyTorch
)


# ---- the CPU kernels, csrc/cpu/rope.cpp

_FORWARD = cpu.Kernel(
    "rope_forward",
    "T* qkv, int64_t stride, float* cosine, float* sine, float* q_weight, float* k_weight, double eps, T* out, "
    "int64_t inverse, int64_t R, int64_t N, int64_t H, int64_t P",
)
_BACKWARD = cpu.Kernel(
    "rope_backward",
    "T* grad_y, int64_t grad_stride, T* qkv, int64_t stride, float* cosine, float* sine, float* q_weight, float* k_weight, "
    "double eps, T* grad_qkv, float* grad_weights, int64_t R, int64_t N, int64_t H, int64_t P",
)


def _tokens(qkv: Tensor) -> tuple[Tensor, int]:
    """qkv as rows of tokens: a tensor at whose address they begin, and the elements between two of them."""
    if qkv.is_contiguous():
        return qkv, qkv.stride(1)
    rows = cpu.rows(qkv.flatten(2))
    return rows, rows.stride(0)


def _sizes(qkv: Tensor) -> tuple[int, ...]:
    batch, tokens, _, heads, width = qkv.shape
    return batch * tokens, tokens, heads, width


def _forward_cpu(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, inverse: bool = False
) -> Tensor:
    out = cpu.empty_like(qkv)
    weights = (None if weight is None else cpu.wide(weight) for weight in (q_weight, k_weight))
    tables = cpu.wide(cos), cpu.wide(sin), *weights
    _FORWARD(qkv.dtype, *_tokens(qkv), *tables, float(eps), out, inverse, *_sizes(qkv))
    return out


def _backward_cpu(
    grad_y: Tensor, cos: Tensor, sin: Tensor, qkv: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    need_qkv: bool, need_q_weight: bool, need_k_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    none = grad_y.new_empty(0)
    if qkv is None or q_weight is None or k_weight is None:
        return _forward_cpu(grad_y, cos, sin, None, None, eps, True) if need_qkv else none, none, none
    grad_qkv, need_weights = cpu.empty_like(qkv, need_qkv), need_q_weight or need_k_weight
    weights = cpu.empty(qkv, (2, qkv.shape[4]), need_weights, torch.float32)
    _BACKWARD(
        qkv.dtype, *_tokens(grad_y), *_tokens(qkv), cpu.wide(cos), cpu.wide(sin), cpu.wide(q_weight), cpu.wide(k_weight), float(eps),
        cpu.pointer(grad_qkv, need_qkv), cpu.pointer(weights, need_weights), *_sizes(qkv),
    )  # fmt: skip
    needs = need_q_weight, need_k_weight
    return grad_qkv, *(weights[i].to(q_weight.dtype) if need else none for i, need in enumerate(needs))


cpu.register(
    "rope",
    _forward_cpu,
    _backward_cpu,
    operands=("qkv", "q_weight"),
    **_choice.by_evidence(
        "rope",
        "tokens, heads, head width",
        lambda qkv, q_weight: (qkv, q_weight, (qkv.shape[0] * qkv.shape[1], *qkv.shape[3:])),
    ),
)


# ---- how it is called


def angles(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [N, P / 2] of positions in one dimension."""
    wide = _check.accumulate_dtype(dtype)
    frequencies = 1e4 ** (-torch.arange(0, width, 2, dtype=wide, device=device) / width)
    turns = torch.arange(tokens, dtype=wide, device=device)[:, None] * frequencies
    return turns.cos(), turns.sin()


def _apply(f: Callable[..., Any], qkv: Tensor, *weights: Tensor) -> Any:
    return f(qkv, *angles(qkv.shape[1], qkv.shape[4], qkv.device, qkv.dtype), *weights)


def _arguments(draw: Callable[..., Tensor], batch: int, tokens: int, heads: int, width: int) -> list[Tensor]:
    return [draw(batch, tokens, 3, heads, width), draw(width) + 1, draw(width) + 1]


CALLS = [
    Call(
        "rope", rope, reference, arguments, label=label, apply=_apply, least=(2, 3, 1, 4), tiny=(2, 7, 3, 20), real=(32, 256, 16, 72),
        measured=measured, counted=lambda batch, tokens, heads, width: (batch * tokens, heads, width),
    )
    for label, arguments, measured in (
        ("", lambda draw, *size: _arguments(draw, *size)[:1], ()),
        ("norm", _arguments, ((32, 16, 3, 64), (8, 256, 6, 64), (8, 256, 16, 128))),
    )
]  # fmt: skip
