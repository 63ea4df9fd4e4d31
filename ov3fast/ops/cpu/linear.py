"""Lays out linear's arguments for csrc/cpu/linear.cpp."""

from .. import _dispatch
from . import dense, empty, missing, pointer, refuses, rows, run


def _forward(x, weight, bias):
    x_RK, weight = rows(x), rows(weight)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    run(
        "linear_forward", x.dtype, x_RK, x_RK.stride(0), weight, weight.stride(0), dense(bias), y, *x_RK.shape, weight.shape[0],
        parameters=weight.dtype,
    )  # fmt: skip
    return y


def _backward(grad_y, x, weight, need_x, need_weight, need_bias):
    grad_y_RN, x_RK, weight = rows(grad_y), rows(x), rows(weight)
    outputs, inputs = weight.shape
    grads = empty(x, x.shape, need_x), empty(weight, (outputs, inputs), need_weight), empty(weight, outputs, need_bias)
    run(
        "linear_backward", x.dtype, grad_y_RN, grad_y_RN.stride(0), x_RK, x_RK.stride(0), weight, weight.stride(0),
        *map(pointer, grads, (need_x, need_weight, need_bias)), *x_RK.shape, outputs,
        parameters=weight.dtype,
    )  # fmt: skip
    return grads


_dispatch.register(
    "linear", "cpu", _forward, _backward, missing=missing, refuses=refuses,
    refuses_backward=lambda grad_y, x, weight, *_: refuses(x, weight),
)  # fmt: skip
