"""Layer normalisation over the last axis, with an optional fused residual addition.

    h = x + residual                                  (h = x without a residual)
    y_..d = (h_..d - mean(h_..)) * rstd(h_..) * weight_d + bias_d,   rstd = 1 / sqrt(var + eps), biased variance

Shapes: x, residual [..., D]; weight, bias [D]. Storage float32, bfloat16 or float64 (float16 on GPUs); statistics in float32
(float64 for float64). weight and bias are of x's dtype or float32. Saved for backward: h, weight, mean, rstd.
Source: Ba et al. 2016 (arXiv 1607.06450); eps 1e-6 as in the official repository's src/models/vit.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _operator, cpu
from ._calls import Call, Draw


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch, the specification. Returns y, or (y, h) when a residual is given."""
    h = x if residual is None else x + residual
    wide = _check.accumulate_dtype(x.dtype)
    y = F.layer_norm(h.to(wide), h.shape[-1:], weight.to(wide), None if bias is None else bias.to(wide), eps).to(x.dtype)
    return y if residual is None else (y, h)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises x (or x + residual) over its last axis.

    x [..., D]; weight and bias [D], of x's dtype or float32; residual like x. Returns y of x's shape and dtype; with a residual
    (y, x + residual). Raises TypeError or ValueError that name the argument.
    """
    found = _layer_norm(impl, x, weight, bias, residual, eps)
    return found[0] if residual is None else (found[0], found[1])


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> None:
    op = "layer_norm"
    _check.tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    _check.tensor(op, "weight", weight)
    _check.parameter(op, "weight", weight, (x.shape[-1],), x, "[D]", mixed=True)
    _check.parameter(op, "bias", bias, (x.shape[-1],), x, "[D]", mixed=True)
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"{op}: bias must be of weight's dtype {weight.dtype}, got {bias.dtype}")
    _check.parameter(op, "residual", residual, tuple(x.shape), x, "like x")


def _forward_eager(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    # The reference by the aten function below F.layer_norm, which also returns the statistics for the backward.
    h = x if residual is None else (x + residual).contiguous()
    wide = _check.accumulate_dtype(x.dtype)
    y, mean, rstd = torch.native_layer_norm(
        h.to(wide), h.shape[-1:], weight.to(wide), None if bias is None else bias.to(wide), eps
    )
    # An operator's output may not be one of its inputs, so without a residual h is empty and x takes its place.
    return y.to(x.dtype), x.new_empty(0) if residual is None else h, mean[..., 0], rstd[..., 0]


def _differentiable(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Any, Tensor]:
    h = (x if residual is None else x + residual).contiguous()
    if weight.dtype != x.dtype:
        return reference(h, weight, bias, eps), h
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h


def _inference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Any, ...]:
    """The forward where no backward follows: without the statistics."""
    plain = _differentiable if x.dtype in (torch.float32, torch.float64) else _forward_eager
    return plain(x, weight, bias, residual, eps)


_forward_eager.inference = _inference  # type: ignore[attr-defined]


def _backward_eager(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_x: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = _check.accumulate_dtype(h.dtype)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(wide), h.to(wide), h.shape[-1:], mean[..., None], rstd[..., None], weight.to(wide),
        torch.empty_like(weight, dtype=wide), [need_x, need_weight, need_bias],
    )  # fmt: skip
    if grad_x is not None and grad_h is not None:
        grad_x = grad_x + grad_h
    return (
        grad_x.to(h.dtype) if need_x else h.new_empty(0),
        grad_weight.to(weight.dtype) if need_weight else h.new_empty(0),
        grad_bias.to(weight.dtype) if need_bias else h.new_empty(0),
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    wide = _check.accumulate_dtype(x.dtype)
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = x.new_empty(x.shape[:-1], dtype=wide)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, stats, torch.empty_like(stats)


def _fake_backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_x: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        h.new_empty(h.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape if need_bias else 0),
    )


def _specification(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float) -> Any:
    found = reference(x, weight, bias, eps, residual=residual)
    return (found, None) if residual is None else found


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    x, weight, _, residual, _ = inputs
    _, h, mean, rstd = output
    if residual is None:
        return _operator.Saved((x, weight, mean, rstd), constants=(h, mean, rstd))
    return _operator.Saved((h, weight, mean, rstd), constants=(mean, rstd))


_dispatch.register(
    "layer_norm", "eager", _forward_eager, _backward_eager, operands=("x",),
    # PyTorch's own backward in 16 bits adds up the gradients of weight and bias in them.
    differentiable=lambda x, *_: _differentiable if x.dtype in (torch.float32, torch.float64) else None,
)  # fmt: skip
_layer_norm = _operator.define(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    fake=_fake,
    check=_check_arguments,
    specification=_specification,
    save=_save,
    gradients={"x": 0, "weight": 1, "bias": 2, "residual": 0},
    upstream=2,
    backward_schema="(Tensor grad_y, Tensor? grad_h, Tensor x, Tensor weight, Tensor mean, Tensor rstd,"
    " bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_backward_eager,  # aten's layer norm, whose formulas hold to any order
)


# ---- the CPU kernels, csrc/cpu/layer_norm.cpp

_FORWARD = cpu.Kernel(
    "layer_norm_forward",
    "T* x, int64_t x_stride, T* residual, int64_t residual_stride, float* weight, float* bias, double eps, T* y, T* h, "
    "float* mean, float* rstd, int64_t R, int64_t D",
)
_BACKWARD = cpu.Kernel(
    "layer_norm_backward",
    "T* grad_y, int64_t grad_y_stride, T* grad_h, int64_t grad_h_stride, T* h, int64_t h_stride, float* weight, float* mean, "
    "float* rstd, T* grad_x, float* grad_weight, float* grad_bias, int64_t R, int64_t D",
)


def _forward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, statistics: bool = True
) -> tuple[Tensor | None, ...]:
    x_RD, x_stride, *sizes = cpu.matrix(x)
    residual_RD, residual_stride, *_ = cpu.NO_ROWS if residual is None else cpu.matrix(residual)
    y, h = cpu.empty_like(x), cpu.empty_like(x, residual is not None)
    mean, rstd = (cpu.empty(x, x.shape[:-1], dtype=torch.float32) if statistics else None for _ in range(2))
    _FORWARD(
        x.dtype, x_RD, x_stride, residual_RD, residual_stride,
        cpu.wide(weight), cpu.wide(bias), float(eps), y, cpu.pointer(h, residual is not None), mean, rstd, *sizes,
    )  # fmt: skip
    return (y, h, mean, rstd) if statistics else (y, h)


_forward_cpu.inference = functools.partial(_forward_cpu, statistics=False)  # type: ignore[attr-defined]


def _backward_cpu(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_x: bool,
    need_weight: bool, need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_y_RD, grad_y_stride, *_ = cpu.matrix(grad_y)
    grad_h_RD, grad_h_stride, *_ = cpu.NO_ROWS if grad_h is None else cpu.matrix(grad_h)
    h_RD, h_stride, *sizes = cpu.matrix(h)
    grad_x, wide_weight = cpu.empty_like(h, need_x), cpu.wide(weight)
    grad_weight, grad_bias = cpu.empty_like(wide_weight, need_weight), cpu.empty_like(wide_weight, need_bias)
    _BACKWARD(
        h.dtype, grad_y_RD, grad_y_stride, grad_h_RD, grad_h_stride, h_RD, h_stride, wide_weight, mean, rstd,
        cpu.pointer(grad_x, need_x), cpu.pointer(grad_weight, need_weight), cpu.pointer(grad_bias, need_bias), *sizes,
    )  # fmt: skip
    if weight.dtype != torch.float32:
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return grad_x, grad_weight, grad_bias


cpu.register(
    "layer_norm",
    _forward_cpu,
    _backward_cpu,
    operands=("x", "weight"),
    **_choice.by_evidence("layer_norm", "rows, width", lambda x, weight: (x, weight, (_choice.rows(x), x.shape[-1]))),
)


# ---- how it is called


def _arguments(draw: Draw, rows: int, width: int) -> list[Tensor]:
    return [draw(rows, width), draw(width) + 1, draw(width), draw(rows, width)]


CALLS = [
    Call(
        "layer_norm", layer_norm, reference, lambda draw, rows, width: _arguments(draw, rows, width)[:3],
        least=(3, 6), tiny=(37, 130), real=(16448, 768),
    ),
    Call(
        "layer_norm", layer_norm, reference, _arguments, label="residual", apply=lambda f, x, w, b, residual: f(x, w, b, residual=residual),
        least=(3, 6), tiny=(37, 130), real=(8224, 1152), measured=((2304, 192), (2048, 768), (16384, 768)),
    ),
]  # fmt: skip
