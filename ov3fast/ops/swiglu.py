"""SwiGLU's gated activation, between the two products of a gated perceptron.

    (g, v) = the halves of x,    y_..h = silu(g_..h) v_..h,    silu(g) = g sigmoid(g)

    dg_..h = dy_..h v_..h s (1 + g_..h (1 - s)),   dv_..h = dy_..h g_..h s,   s = sigmoid(g_..h)

Shapes: x [..., 2 H], the gate's half first, as one product with both weights gives it; y [..., H]. Storage float32, bfloat16 or float64
(float16 on GPUs). Saved for backward: x alone, where PyTorch's own graph keeps silu(g) too.

The products stay outside. Memory bounds the activation: in one pass it reads x and writes y, 3 numbers for each of H where PyTorch moves 5, and back
5 where PyTorch moves 15 or so, so it wins at any size. The products next to it are the vendor's where these are faster, and `linear` chooses them.
A kernel that held both products as well would have to win against them first, to save one read of x and one write of y.
Source: Shazeer 2020 (arXiv 2002.05202), eq. 6, without biases.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _operator, cpu
from ._calls import Call


def reference(x: Tensor) -> Tensor:
    """Plain PyTorch, the specification."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def swiglu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """silu(gate) * value of x [..., 2 H] = (gate, value), as [..., H] of x's dtype. TypeError or ValueError that names the argument."""
    y: Tensor = _swiglu(impl, x)
    return y


def _check_arguments(x: Tensor) -> None:
    op = "swiglu"
    _check.tensor(op, "x", x)
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"{op}: x must be [..., 2 H], gate and value side by side; got shape {tuple(x.shape)}")


def _backward_eager(grad_y: Tensor, x: Tensor, need_x: bool) -> Tensor:
    gate, value = x.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(grad_y * value, gate), grad_y * F.silu(gate)], -1)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _differentiable_backward(grad_y: Tensor, x: Tensor, need_x: bool) -> Tensor:
    return _operator.gradients(reference, (x,), grad_y)[0]


_dispatch.register("swiglu", "eager", reference, _backward_eager, differentiable=lambda *_: lambda x: reference(x))
_swiglu = _operator.define(
    "swiglu",
    "(Tensor x) -> Tensor",
    fake=_fake,
    check=_check_arguments,
    specification=reference,
    save=lambda inputs, output: _operator.Saved((inputs[0],)),
    gradients={"x": 0},
    backward_schema="(Tensor grad_y, Tensor x, bool need_x) -> Tensor",
    backward_fake=lambda grad_y, x, need_x: x.new_empty(x.shape),
    differentiable_backward=_differentiable_backward,
)


# ---- the CPU kernels, csrc/cpu/swiglu.cpp

_FORWARD = cpu.Kernel("swiglu_forward", "T* x, int64_t x_stride, T* y, int64_t R, int64_t H")
_BACKWARD = cpu.Kernel(
    "swiglu_backward", "T* grad_y, int64_t grad_stride, T* x, int64_t x_stride, T* grad_x, int64_t R, int64_t H"
)


def _forward_cpu(x: Tensor) -> Tensor:
    x_RW, stride, rows, width = cpu.matrix(x)
    y = cpu.empty(x, (*x.shape[:-1], width // 2))
    _FORWARD(x.dtype, x_RW, stride, y, rows, width // 2)
    return y


def _backward_cpu(grad_y: Tensor, x: Tensor, need_x: bool) -> Tensor:
    grad_RH, grad_stride, rows, hidden = cpu.matrix(grad_y)
    x_RW, stride, *_ = cpu.matrix(x)
    grad_x = cpu.empty_like(x)
    _BACKWARD(x.dtype, grad_RH, grad_stride, x_RW, stride, grad_x, rows, hidden)
    return grad_x


cpu.register(
    "swiglu",
    _forward_cpu,
    _backward_cpu,
    operands=("x",),
    **_choice.by_evidence("swiglu", "rows, hidden width", lambda x: (x, None, (_choice.rows(x), x.shape[-1] // 2))),
)


# ---- how it is called

CALLS = [
    Call(
        "swiglu", swiglu, reference, lambda draw, rows, hidden: [draw(rows, 2 * hidden)],
        least=(3, 5), tiny=(21, 150), real=(16384, 3072), measured=((512, 512), (2048, 1024), (2048, 5461)),
    )
]  # fmt: skip
