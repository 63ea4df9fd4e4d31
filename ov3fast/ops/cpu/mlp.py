"""Lays out mlp's arguments for csrc/cpu/mlp.cpp."""

from .. import _dispatch
from . import Kernel, dense, empty, pointer, rows, unavailable_reason, unsupported_reason

FORWARD = Kernel(
    "mlp_forward",
    "T* x, int64_t x_stride, P* w1, int64_t w1_stride, P* b1, P* w2, int64_t w2_stride, P* b2, T* y, T* h, int64_t kind, "
    "int64_t R, int64_t K, int64_t H, int64_t D",
    mixed=True,
)
BACKWARD = Kernel(
    "mlp_backward",
    "T* grad_y, int64_t grad_stride, T* x, int64_t x_stride, T* h, int64_t h_stride, P* w1, int64_t w1_stride, P* w2, "
    "int64_t w2_stride, T* grad_x, P* grad_w1, P* grad_b1, P* grad_w2, P* grad_b2, int64_t kind, int64_t R, int64_t K, "
    "int64_t H, int64_t D",
    mixed=True,
)

_KINDS = {"gelu": 0, "gelu_tanh": 1}


def _forward(x, w1, b1, w2, b2, activation):
    x_RK, w1, w2 = rows(x), rows(w1), rows(w2)
    y, h = empty(x, (*x.shape[:-1], w2.shape[0])), empty(x, (*x.shape[:-1], w1.shape[0]))
    FORWARD(
        x.dtype, x_RK, x_RK.stride(0), w1, w1.stride(0), dense(b1), w2, w2.stride(0), dense(b2), y, h,
        _KINDS[activation], *x_RK.shape, w1.shape[0], w2.shape[0], parameters=w1.dtype,
    )  # fmt: skip
    return y, h


def _backward(grad_y, x, h, w1, b1, w2, activation, need_x, need_w1, need_b1, need_w2, need_b2):
    grad_RD, x_RK, h_RH, w1, w2 = rows(grad_y), rows(x), rows(h), rows(w1), rows(w2)
    needs = need_x, need_w1, need_b1, need_w2, need_b2
    shapes = x.shape, w1.shape, w1.shape[0], w2.shape, w2.shape[0]
    like = grad_y, w1, w1, w1, w1
    grads = tuple(empty(*wanted) for wanted in zip(like, shapes, needs, strict=True))
    BACKWARD(
        x.dtype, grad_RD, grad_RD.stride(0), x_RK, x_RK.stride(0), h_RH, h_RH.stride(0),
        w1, w1.stride(0), w2, w2.stride(0), *map(pointer, grads, needs),
        _KINDS[activation], *x_RK.shape, w1.shape[0], w2.shape[0], parameters=w1.dtype,
    )  # fmt: skip
    return grads


_dispatch.register(
    "mlp", "cpu", _forward, _backward, operands=("x", "w1"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason,
)  # fmt: skip
