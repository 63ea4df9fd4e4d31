"""Lays out mlp's arguments for csrc/cpu/mlp.cpp."""

from .. import _choice, _dispatch
from . import Kernel, dense, empty, empty_like, matrix, pointer, unavailable_reason, unsupported_reason

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
    x_RK, x_stride, *sizes = matrix(x)
    w1, w1_stride, hidden, _ = matrix(w1)
    w2, w2_stride, outputs, _ = matrix(w2)
    before = x.shape[:-1]
    y, h = empty(x, (*before, outputs)), empty(x, (*before, hidden))
    FORWARD(
        x.dtype, x_RK, x_stride, w1, w1_stride, dense(b1), w2, w2_stride, dense(b2), y, h,
        _KINDS[activation], *sizes, hidden, outputs, parameters=w1.dtype,
    )  # fmt: skip
    return y, h


def _backward(grad_y, x, h, w1, b1, w2, activation, need_x, need_w1, need_b1, need_w2, need_b2):
    grad_RD, grad_stride, *_ = matrix(grad_y)
    x_RK, x_stride, *sizes = matrix(x)
    h_RH, h_stride, *_ = matrix(h)
    w1_HK, w1_stride, hidden, _ = matrix(w1)
    w2_DH, w2_stride, outputs, _ = matrix(w2)
    grads = (
        empty_like(x, need_x),
        empty_like(w1, need_w1),
        empty(w1, (hidden,), need_b1),
        empty_like(w2, need_w2),
        empty(w1, (outputs,), need_b2),
    )
    BACKWARD(
        x.dtype, grad_RD, grad_stride, x_RK, x_stride, h_RH, h_stride, w1_HK, w1_stride, w2_DH, w2_stride,
        *map(pointer, grads, (need_x, need_w1, need_b1, need_w2, need_b2)),
        _KINDS[activation], *sizes, hidden, outputs, parameters=w1.dtype,
    )  # fmt: skip
    return grads


_dispatch.register(
    "mlp", "cpu", _forward, _backward, operands=("x", "w1"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("mlp"),
)  # fmt: skip
