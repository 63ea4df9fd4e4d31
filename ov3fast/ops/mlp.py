"""The transformer's two-layer perceptron.

    h_..m = sum_k x_..k W1_mk + b1_m        a = gelu(h)        y_..d = sum_m a_..m W2_dm + b2_d

    da = dy W2    dh = da gelu'(h)    dx = dh W1    dW1 = dh^T x    dW2 = dy^T a    db1 = sum dh    db2 = sum dy

gelu(h) = h Phi(h) with "gelu"; h/2 (1 + tanh(sqrt(2/pi) (h + 0.044715 h^3))) with "gelu_tanh".
Shapes: x [..., K]; w1 [H, K], b1 [H]; w2 [D, H], b2 [D]; y [..., D]. Storage float32, bfloat16 or float64 (float16 on GPUs). The
parameters are of x's dtype, or float32 beside a narrower x: they are then rounded to x's dtype on the way into the products, and their
gradients are float32, so that autocast needs no copy of a parameter.
Saved for backward: x, h (rounded to x's dtype), w1, w2; a is computed again.
Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 2, with Hendrycks and Gimpel 2016 (arXiv 1606.08415).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _flops, _operator, cpu
from ._calls import Call, Draw

# The public name -> PyTorch's.
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


def reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu") -> Tensor:
    """Plain PyTorch, the specification."""
    b1, b2 = (None if b is None else b.to(x.dtype) for b in (b1, b2))
    a = F.gelu(F.linear(x, w1.to(x.dtype), b1), approximate=ACTIVATIONS[activation])
    return F.linear(a, w2.to(x.dtype), b2)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    impl: str | None = None,
) -> Tensor:
    """gelu(x w1^T + b1) w2^T + b2, [..., D].

    x [..., K]; w1 [H, K], b1 [H] or None, w2 [D, H], b2 [D] or None, all of x's dtype or all float32. activation "gelu" (exact) or
    "gelu_tanh". All tensors get gradients; under autocast x is cast. Raises TypeError or ValueError that name the argument.
    """
    y: Tensor = _mlp(impl, x, w1, b1, w2, b2, activation)[0]
    return y


def _check_arguments(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> None:
    op = "mlp"
    _check.tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got a scalar")
    _check.tensor(op, "w1", w1, ndim=2)
    _check.tensor(op, "w2", w2, ndim=2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    hidden = w1.shape[0]
    _check.parameter(op, "w1", w1, (hidden, x.shape[-1]), x, "[H, K]", mixed=True)
    _check.parameter(op, "b1", b1, (hidden,), w1, "[H]")
    _check.parameter(op, "w2", w2, (w2.shape[0], hidden), w1, "[D, H]")
    _check.parameter(op, "b2", b2, (w2.shape[0],), w1, "[D]")


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [R, K], contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _forward_eager(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    # The reference step by step: the backward needs h.
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    b1, b2 = (None if b is None else b.to(x.dtype) for b in (b1, b2))
    h = F.linear(_rows(x), w1, b1)
    y = F.linear(F.gelu(h, approximate=ACTIVATIONS[activation]), w2, b2)
    return y.view(*x.shape[:-1], w2.shape[0]), h.view(*x.shape[:-1], w1.shape[0])


def _backward_eager(
    grad_y: Tensor, x: Tensor, h: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, need_x: bool,
    need_w1: bool, need_b1: bool, need_w2: bool, need_b2: bool, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> tuple[Tensor, ...]:  # fmt: skip
    approximate = ACTIVATIONS[activation]
    kept, w1, w2 = w1.dtype, w1.to(x.dtype), w2.to(x.dtype)
    grad_y, h_rows = _rows(grad_y), _rows(h)
    grad_x = none = grad_y.new_empty(0)
    grad_w1 = grad_b1 = no_parameter = none.to(kept)
    grad_w2 = (grad_y.t() @ F.gelu(h_rows, approximate=approximate)).to(kept) if need_w2 else no_parameter
    grad_b2 = grad_y.sum(0, dtype=kept) if need_b2 else no_parameter
    if need_x or need_w1 or need_b1:
        grad_h = torch.ops.aten.gelu_backward(product(grad_y, w2), h_rows, approximate=approximate)
        grad_x = product(grad_h, w1).view(x.shape) if need_x else none
        grad_w1 = (grad_h.t() @ _rows(x)).to(kept) if need_w1 else no_parameter
        grad_b1 = grad_h.sum(0, dtype=kept) if need_b1 else no_parameter
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2


def _fake(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    return x.new_empty(*x.shape[:-1], w2.shape[0]), x.new_empty(*x.shape[:-1], w1.shape[0])


def _fake_backward(
    grad_y: Tensor, x: Tensor, h: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, need_x: bool,
    need_w1: bool, need_b1: bool, need_w2: bool, need_b2: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        grad_y.new_empty(x.shape if need_x else 0),
        w1.new_empty(w1.shape if need_w1 else 0),
        w1.new_empty(w1.shape[0] if need_b1 else 0),
        w1.new_empty(w2.shape if need_w2 else 0),
        w1.new_empty(w2.shape[0] if need_b2 else 0),
    )


def _differentiable(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    return (reference(_rows(x), w1, b1, w2, b2, activation=activation).view(*x.shape[:-1], w2.shape[0]),)


def _specification(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    return (reference(x, w1, b1, w2, b2, activation=activation),)


def _differentiable_backward(
    grad_y: Tensor, x: Tensor, h: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, *needs: bool
) -> tuple[Tensor, ...]:
    no_bias = w1.new_zeros(w1.shape[0]) if b1 is None else b1
    return _operator.gradients(
        lambda *inputs: reference(*inputs, activation=activation), (x, w1, no_bias, w2, w2.new_zeros(w2.shape[0])), grad_y
    )


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    x, w1, b1, w2, _, activation = inputs
    return _operator.Saved((x, output[1], w1, b1, w2), (activation,), constants=(output[1],))


_dispatch.register("mlp", "eager", _forward_eager, _backward_eager, differentiable=lambda *_: _differentiable)
_mlp = _operator.define(
    "mlp",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation) -> (Tensor y, Tensor h)",
    fake=_fake,
    check=_check_arguments,
    autocast=("x",),
    specification=_specification,
    save=_save,
    gradients={"x": 0, "w1": 1, "b1": 2, "w2": 3, "b2": 4},
    # b1 is for the gradient of a gradient: backends have it in h.
    backward_schema="(Tensor grad_y, Tensor x, Tensor h, Tensor w1, Tensor? b1, Tensor w2, str activation,"
    " bool need_x, bool need_w1, bool need_b1, bool need_w2, bool need_b2) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
)


# ---- its products, for FlopCounterMode


def _flops_forward(x: _flops.Shape, w1: _flops.Shape, b1: Any, w2: _flops.Shape, *_: Any) -> int:
    rows = math.prod(x[:-1])
    return 2 * rows * (math.prod(w1) + math.prod(w2))


def _flops_backward(
    grad_y: Any, x: _flops.Shape, h: Any, w1: _flops.Shape, b1: Any, w2: _flops.Shape, activation: str, need_x: bool,
    need_w1: bool, need_b1: bool, need_w2: bool, *_: Any,
) -> int:  # fmt: skip
    first, second = (2 * math.prod(x[:-1]) * math.prod(w) for w in (w1, w2))
    return (need_x + need_w1) * first + ((need_x or need_w1 or need_b1) + need_w2) * second


_flops.counts("mlp", _flops_forward, _flops_backward)


# ---- the CPU kernels, csrc/cpu/mlp.cpp

_FORWARD = cpu.Kernel(
    "mlp_forward",
    "T* x, int64_t x_stride, P* w1, int64_t w1_stride, P* b1, P* w2, int64_t w2_stride, P* b2, T* y, T* h, int64_t kind, "
    "int64_t R, int64_t K, int64_t H, int64_t D",
    mixed=True,
)
_BACKWARD = cpu.Kernel(
    "mlp_backward",
    "T* grad_y, int64_t grad_stride, T* x, int64_t x_stride, T* h, int64_t h_stride, P* w1, int64_t w1_stride, P* w2, "
    "int64_t w2_stride, T* grad_x, P* grad_w1, P* grad_b1, P* grad_w2, P* grad_b2, int64_t kind, int64_t R, int64_t K, "
    "int64_t H, int64_t D",
    mixed=True,
)

_KINDS = {"gelu": 0, "gelu_tanh": 1}


def _forward_cpu(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    x_RK, x_stride, *sizes = cpu.matrix(x)
    w1, w1_stride, hidden, _ = cpu.matrix(w1)
    w2, w2_stride, outputs, _ = cpu.matrix(w2)
    before = x.shape[:-1]
    y, h = cpu.empty(x, (*before, outputs)), cpu.empty(x, (*before, hidden))
    _FORWARD(
        x.dtype, x_RK, x_stride, w1, w1_stride, cpu.dense(b1), w2, w2_stride, cpu.dense(b2), y, h,
        _KINDS[activation], *sizes, hidden, outputs, parameters=w1.dtype,
    )  # fmt: skip
    return y, h


def _backward_cpu(
    grad_y: Tensor, x: Tensor, h: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, activation: str, need_x: bool,
    need_w1: bool, need_b1: bool, need_w2: bool, need_b2: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_RD, grad_stride, *_ = cpu.matrix(grad_y)
    x_RK, x_stride, *sizes = cpu.matrix(x)
    h_RH, h_stride, *_ = cpu.matrix(h)
    w1_HK, w1_stride, hidden, _ = cpu.matrix(w1)
    w2_DH, w2_stride, outputs, _ = cpu.matrix(w2)
    grads = (
        cpu.empty_like(x, need_x),
        cpu.empty_like(w1, need_w1),
        cpu.empty(w1, (hidden,), need_b1),
        cpu.empty_like(w2, need_w2),
        cpu.empty(w1, (outputs,), need_b2),
    )
    _BACKWARD(
        x.dtype, grad_RD, grad_stride, x_RK, x_stride, h_RH, h_stride, w1_HK, w1_stride, w2_DH, w2_stride,
        *map(cpu.pointer, grads, (need_x, need_w1, need_b1, need_w2, need_b2)),
        _KINDS[activation], *sizes, hidden, outputs, parameters=w1.dtype,
    )  # fmt: skip
    return grads


cpu.register(
    "mlp",
    _forward_cpu,
    _backward_cpu,
    operands=("x", "w1"),
    **_choice.by_evidence(
        "mlp", "rows, width, hidden width", lambda x, w1: (x, w1, (_choice.rows(x), *w1.shape[::-1])), products="eager"
    ),
)


# ---- how it is called


def _arguments(draw: Draw, rows: int, width: int, hidden: int) -> list[Tensor]:
    return [
        draw(rows, width), draw(hidden, width, scale=width**-0.5), draw(hidden), draw(width, hidden, scale=hidden**-0.5), draw(width),
    ]  # fmt: skip


CALLS = [
    Call(
        "mlp", mlp, reference, _arguments, label=activation, apply=lambda f, *a, activation=activation: f(*a, activation=activation),
        least=(3, 4, 5), tiny=(70, 40, 150), real=(8224, 768, 3072), measured=measured, parameters=(1, 2, 3, 4),
    )
    for activation, measured in (("gelu", ((2304, 192, 768), (256, 768, 3072), (1024, 768, 3072))), ("gelu_tanh", ()))
]  # fmt: skip
