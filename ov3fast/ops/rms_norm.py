"""RMS normalisation over the last axis, with an optional fused residual addition.

    h = x + residual                                  (h = x without a residual)
    y_..d = h_..d * rstd(h_..) * weight_d,   rstd = 1 / sqrt(mean_d h_..d^2 + eps)

    dh_..d = rstd (w_d dy_..d - x_hat_..d mean_d(w_d dy_..d x_hat_..d)) + dh_residual,   x_hat = h rstd,   dw_d = sum_.. dy_..d x_hat_..d

Shapes: x, residual [..., D]; weight [D]. Storage float32, bfloat16 or float64 (float16 on GPUs); the mean in float32 (float64 for
float64). weight is of x's dtype or float32. Saved for backward: h, weight; rstd is computed again, in the pass over h that its gradient needs
anyway.
Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4; eps inside the root as in torch.nn.RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _operator, cpu
from ._calls import Call


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None) -> Any:
    """Plain PyTorch, the specification. Returns y, or (y, h) when a residual is given."""
    h = x if residual is None else x + residual
    wide = h.to(_check.accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * rstd * weight.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, h)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None, impl: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Divides x (or x + residual) by its root mean square over the last axis and multiplies by weight.

    x [..., D]; weight [D], of x's dtype or float32; residual like x. Returns y of x's shape and dtype; with a residual (y, x + residual).
    Raises TypeError or ValueError that name the argument.
    """
    found = _rms_norm(impl, x, weight, residual, eps)
    return found[0] if residual is None else (found[0], found[1])


def _check_arguments(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> None:
    op = "rms_norm"
    _check.tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    _check.tensor(op, "weight", weight)
    _check.parameter(op, "weight", weight, (x.shape[-1],), x, "[D]", mixed=True)
    _check.parameter(op, "residual", residual, tuple(x.shape), x, "like x")


def _forward_eager(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    # An operator's output may not be one of its inputs, so without a residual h is empty and x takes its place.
    none = x.new_empty(0)
    h = (x if residual is None else x + residual).contiguous()
    wide = _check.accumulate_dtype(x.dtype)
    y = F.rms_norm(h.to(wide), h.shape[-1:], weight.to(wide), eps).to(x.dtype)
    return y, none if residual is None else h


def _differentiable(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    h = x if residual is None else x + residual
    if weight.dtype != x.dtype:
        return reference(h, weight, eps), h
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


def _backward_eager(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, eps: float, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    wide = _check.accumulate_dtype(h.dtype)
    values, grad = h.to(wide), grad_y.to(wide)
    rstd = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normal = values * rstd
    grad_x = grad_weight = h.new_empty(0)
    if need_weight:
        grad_weight = (grad * normal).reshape(_choice.rows(h), h.shape[-1]).sum(0).to(weight.dtype)
    if need_x:
        scaled = grad * weight.to(wide)
        grad_x = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * rstd
        grad_x = (grad_x if grad_h is None else grad_x + grad_h).to(h.dtype)
    return grad_x, grad_weight


def _fake(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h


def _fake_backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, eps: float, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _specification(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> Any:
    found = reference(x, weight, eps, residual=residual)
    return (found, None) if residual is None else found


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    x, weight, residual, eps = inputs
    h = output[1]
    if residual is None:
        return _operator.Saved((x, weight), (eps,), constants=(h,))
    return _operator.Saved((h, weight), (eps,))


_dispatch.register(
    "rms_norm", "eager", _forward_eager, _backward_eager,
    # PyTorch's own backward in 16 bits adds up the gradient of weight in them.
    differentiable=lambda x, *_: _differentiable if x.dtype in (torch.float32, torch.float64) else None,
)  # fmt: skip
_rms_norm = _operator.define(
    "rms_norm",
    "(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor y, Tensor h)",
    fake=_fake,
    check=_check_arguments,
    specification=_specification,
    save=_save,
    gradients={"x": 0, "weight": 1, "residual": 0},
    upstream=2,
    backward_schema="(Tensor grad_y, Tensor? grad_h, Tensor x, Tensor weight, float eps, bool need_x, bool need_weight)"
    " -> (Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_backward_eager,  # plain PyTorch
)


# ---- the CPU kernels, csrc/cpu/rms_norm.cpp

_FORWARD = cpu.Kernel(
    "rms_norm_forward",
    "T* x, int64_t x_stride, T* residual, int64_t residual_stride, float* weight, double eps, T* y, T* h, int64_t R, int64_t D",
)
_BACKWARD = cpu.Kernel(
    "rms_norm_backward",
    "T* grad_y, int64_t grad_y_stride, T* grad_h, int64_t grad_h_stride, T* h, int64_t h_stride, float* weight, double eps, "
    "T* grad_x, float* grad_weight, int64_t R, int64_t D",
)


def _forward_cpu(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    x_RD, x_stride, *sizes = cpu.matrix(x)
    residual_RD, residual_stride, *_ = cpu.NO_ROWS if residual is None else cpu.matrix(residual)
    y, h = cpu.empty_like(x), cpu.empty_like(x, residual is not None)
    _FORWARD(
        x.dtype, x_RD, x_stride, residual_RD, residual_stride,
        cpu.wide(weight), float(eps), y, cpu.pointer(h, residual is not None), *sizes,
    )  # fmt: skip
    return y, h


def _backward_cpu(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, eps: float, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_y_RD, grad_y_stride, *_ = cpu.matrix(grad_y)
    grad_h_RD, grad_h_stride, *_ = cpu.NO_ROWS if grad_h is None else cpu.matrix(grad_h)
    h_RD, h_stride, *sizes = cpu.matrix(h)
    grad_x, wide_weight = cpu.empty_like(h, need_x), cpu.wide(weight)
    grad_weight = cpu.empty_like(wide_weight, need_weight)
    _BACKWARD(
        h.dtype, grad_y_RD, grad_y_stride, grad_h_RD, grad_h_stride, h_RD, h_stride, wide_weight, float(eps),
        cpu.pointer(grad_x, need_x), cpu.pointer(grad_weight, need_weight), *sizes,
    )  # fmt: skip
    return grad_x, grad_weight if weight.dtype == torch.float32 else grad_weight.to(weight.dtype)


cpu.register(
    "rms_norm",
    _forward_cpu,
    _backward_cpu,
    operands=("x", "weight"),
    **_choice.by_evidence("rms_norm", "rows, width", lambda x, weight: (x, weight, (_choice.rows(x), x.shape[-1]))),
)


# ---- how it is called


def _arguments(draw: Callable[..., Tensor], rows: int, width: int) -> list[Tensor]:
    return [draw(rows, width), draw(width) + 1, draw(rows, width)]


CALLS = [
    Call(
        "rms_norm", rms_norm, reference, lambda draw, rows, width: _arguments(draw, rows, width)[:2],
        least=(3, 6), tiny=(37, 130), real=(16384, 1152),
    ),
    Call(
        "rms_norm", rms_norm, reference, _arguments, label="residual", apply=lambda f, x, w, residual: f(x, w, residual=residual),
        least=(3, 6), tiny=(37, 130), real=(16384, 1152), measured=((512, 192), (2048, 384), (2048, 2048)),
    ),
]  # fmt: skip
