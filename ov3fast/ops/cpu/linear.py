"""Lays out linear's arguments for csrc/cpu/linear.cpp."""

from .. import _choice, _dispatch
from . import Kernel, dense, empty, empty_like, matrix, pointer, unavailable_reason, unsupported_reason

FORWARD = Kernel(
    "linear_forward",
    "T* x, int64_t x_stride, P* w, int64_t w_stride, P* bias, T* y, int64_t R, int64_t K, int64_t N",
    mixed=True,
)
BACKWARD = Kernel(
    "linear_backward",
    "T* grad_y, int64_t grad_stride, T* x, int64_t x_stride, P* w, int64_t w_stride, T* grad_x, P* grad_w, P* grad_bias, "
    "int64_t R, int64_t K, int64_t N",
    mixed=True,
)


def _forward(x, weight, bias):
    x_RK, x_stride, *sizes = matrix(x)
    weight, w_stride, outputs, _ = matrix(weight)
    y = empty(x, (*x.shape[:-1], outputs))
    FORWARD(x.dtype, x_RK, x_stride, weight, w_stride, dense(bias), y, *sizes, outputs, parameters=weight.dtype)
    return y


def _backward(grad_y, x, weight, need_x, need_weight, need_bias):
    grad_y_RN, grad_stride, *_ = matrix(grad_y)
    x_RK, x_stride, *sizes = matrix(x)
    w_NK, w_stride, outputs, _ = matrix(weight)
    grads = empty_like(x, need_x), empty_like(weight, need_weight), empty(weight, (outputs,), need_bias)
    BACKWARD(
        x.dtype, grad_y_RN, grad_stride, x_RK, x_stride, w_NK, w_stride,
        *map(pointer, grads, (need_x, need_weight, need_bias)), *sizes, outputs, parameters=weight.dtype,
    )  # fmt: skip
    return grads


_dispatch.register(
    "linear", "cpu", _forward, _backward, operands=("x", "weight"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("linear"),
)  # fmt: skip
