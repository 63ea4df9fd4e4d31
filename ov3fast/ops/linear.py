"""The plain linear layer, behind the same choice of backends as the fused operators around it.

    y_..n = sum_k x_..k W_nk + b_n        dx = dy W    dW = dy^T x    db = sum dy

Shapes: x [..., K]; weight [N, K] (nn.Linear's layout); bias [N]; y [..., N]. Storage float32, bfloat16 or float64 (float16 on GPUs),
accumulation in float32 (float64 for float64). weight and bias are of x's dtype, or float32 beside a narrower x: they are then rounded to
x's dtype on the way into the product, and their gradients are float32, so that autocast needs no copy of a parameter. Saved for backward:
x, weight.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _flops, _operator, cpu
from ._calls import Call


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch, the specification."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """x weight^T + bias, [..., N].

    x [..., K]; weight [N, K] and bias [N] or None, of x's dtype or float32. All get gradients; under autocast x is cast. Raises TypeError
    or ValueError that name the argument.
    """
    y: Tensor = _linear(impl, x, weight, bias)
    return y


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "linear"
    _check.tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    _check.tensor(op, "weight", weight, ndim=2)
    _check.parameter(op, "weight", weight, (weight.shape[0], x.shape[-1]), x, "[N, K]", mixed=True)
    _check.parameter(op, "bias", bias, (weight.shape[0],), x, "[N]", mixed=True)
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"{op}: bias must be of weight's dtype {weight.dtype}, got {bias.dtype}")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _forward_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # An operator's output has to be contiguous as the fake says; F.linear follows its input's layout.
    return reference(_rows(x).contiguous(), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _differentiable(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference(x, weight, bias) if x.is_contiguous() else _forward_eager(x, weight, bias)


_forward_eager.inference = _differentiable  # type: ignore[attr-defined]


def _backward_eager(
    grad_y: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    grad_y, none = _rows(grad_y), grad_y.new_empty(0)
    return (
        (grad_y @ weight.to(x.dtype)).view(x.shape) if need_x else none,
        (grad_y.t() @ _rows(x)).to(weight.dtype) if need_weight else none.to(weight.dtype),
        grad_y.sum(0, dtype=weight.dtype) if need_bias else none.to(weight.dtype),
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    return (
        grad_y.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


_dispatch.register("linear", "eager", _forward_eager, _backward_eager, differentiable=lambda *_: _differentiable)
_linear = _operator.define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fake,
    check=_check_arguments,
    autocast=("x",),
    specification=reference,
    save=lambda inputs, output: _operator.Saved((inputs[0], inputs[1])),
    gradients={"x": 0, "weight": 1, "bias": 2},
    backward_schema="(Tensor grad_y, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_backward_eager,
)


# ---- its products, for FlopCounterMode


def _flops_forward(x: _flops.Shape, weight: _flops.Shape, *_: Any) -> int:
    return _flops.product(x, weight)


def _flops_backward(grad_y: Any, x: _flops.Shape, weight: _flops.Shape, need_x: bool, need_weight: bool, *_: Any) -> int:
    return (need_x + need_weight) * _flops.product(x, weight)


_flops.counts("linear", _flops_forward, _flops_backward)


# ---- the CPU kernels, csrc/cpu/linear.cpp

_FORWARD = cpu.Kernel(
    "linear_forward",
    "T* x, int64_t x_stride, P* w, int64_t w_stride, P* bias, T* y, int64_t R, int64_t K, int64_t N",
    mixed=True,
)
_BACKWARD = cpu.Kernel(
    "linear_backward",
    "T* grad_y, int64_t grad_stride, T* x, int64_t x_stride, P* w, int64_t w_stride, T* grad_x, P* grad_w, P* grad_bias, "
    "int64_t R, int64_t K, int64_t N",
    mixed=True,
)


def _forward_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x_RK, x_stride, *sizes = cpu.matrix(x)
    weight, w_stride, outputs, _ = cpu.matrix(weight)
    y = cpu.empty(x, (*x.shape[:-1], outputs))
    _FORWARD(x.dtype, x_RK, x_stride, weight, w_stride, cpu.dense(bias), y, *sizes, outputs, parameters=weight.dtype)
    return y


def _backward_cpu(
    grad_y: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    grad_y_RN, grad_stride, *_ = cpu.matrix(grad_y)
    x_RK, x_stride, *sizes = cpu.matrix(x)
    w_NK, w_stride, outputs, _ = cpu.matrix(weight)
    grads = cpu.empty_like(x, need_x), cpu.empty_like(weight, need_weight), cpu.empty(weight, (outputs,), need_bias)
    _BACKWARD(
        x.dtype, grad_y_RN, grad_stride, x_RK, x_stride, w_NK, w_stride,
        *map(cpu.pointer, grads, (need_x, need_weight, need_bias)), *sizes, outputs, parameters=weight.dtype,
    )  # fmt: skip
    return grads


cpu.register(
    "linear",
    _forward_cpu,
    _backward_cpu,
    operands=("x", "weight"),
    **_choice.by_evidence(
        "linear",
        "rows, inputs, outputs",
        lambda x, weight: (x, weight, (_choice.rows(x), *weight.shape[::-1])),
        products="eager",
    ),
)


# ---- how it is called

CALLS = [
    Call(
        "linear", linear, reference, lambda draw, rows, k, n: [draw(rows, k), draw(n, k, scale=k**-0.5), draw(n)],
        least=(3, 4, 5), tiny=(150, 72, 140), real=(16448, 768, 2304), measured=((2304, 192, 576), (256, 768, 768), (2048, 768, 2304)),
        parameters=(1, 2),
    )
]  # fmt: skip
