"""Lays out linear's arguments for csrc/cpu/linear.cpp."""

from .. import _dispatch
from . import Kernel, dense, empty, pointer, rows, unavailable_reason, unsupported_reason

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
    x_RK, weight = rows(x), rows(weight)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    FORWARD(
        x.dtype, x_RK, x_RK.stride(0), weight, weight.stride(0), dense(bias), y, *x_RK.shape, weight.shape[0],
        parameters=weight.dtype,
    )  # fmt: skip
    return y


def _backward(grad_y, x, weight, need_x, need_weight, need_bias):
    grad_y_RN, x_RK, weight = rows(grad_y), rows(x), rows(weight)
    outputs, inputs = weight.shape
    grads = empty(x, x.shape, need_x), empty(weight, (outputs, inputs), need_weight), empty(weight, outputs, need_bias)
    BACKWARD(
        x.dtype, grad_y_RN, grad_y_RN.stride(0), x_RK, x_RK.stride(0), weight, weight.stride(0),
        *map(pointer, grads, (need_x, need_weight, need_bias)), *x_RK.shape, outputs,
        parameters=weight.dtype,
    )  # fmt: skip
    return grads


_dispatch.register(
    "linear", "cpu", _forward, _backward, operands=("x", "weight"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason,
)  # fmt: skip
