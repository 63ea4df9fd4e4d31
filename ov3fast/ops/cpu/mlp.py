"""Lays out mlp's arguments for csrc/cpu/mlp.cpp."""

from .. import _dispatch
from . import dense, empty, missing, pointer, refuses, rows, run

_KINDS = {"gelu": 0, "gelu_tanh": 1}


def _forward(x, w1, b1, w2, b2, activation):
    x_RK, w1, w2 = rows(x), rows(w1), rows(w2)
    y, h = empty(x, (*x.shape[:-1], w2.shape[0])), empty(x, (*x.shape[:-1], w1.shape[0]))
    run(
        "mlp_forward", x.dtype, x_RK, x_RK.stride(0), w1, w1.stride(0), dense(b1), w2, w2.stride(0), dense(b2), y, h,
        _KINDS[activation], *x_RK.shape, w1.shape[0], w2.shape[0], parameters=w1.dtype,
    )  # fmt: skip
    return y, h


def _backward(grad_y, x, h, w1, w2, activation, need_x, need_w1, need_b1, need_w2, need_b2):
    grad_RD, x_RK, h_RH, w1, w2 = rows(grad_y), rows(x), rows(h), rows(w1), rows(w2)
    needs = need_x, need_w1, need_b1, need_w2, need_b2
    shapes = x.shape, w1.shape, w1.shape[0], w2.shape, w2.shape[0]
    like = grad_y, w1, w1, w1, w1
    grads = tuple(empty(*wanted) for wanted in zip(like, shapes, needs, strict=True))
    run(
        "mlp_backward", x.dtype, grad_RD, grad_RD.stride(0), x_RK, x_RK.stride(0), h_RH, h_RH.stride(0),
        w1, w1.stride(0), w2, w2.stride(0), *map(pointer, grads, needs),
        _KINDS[activation], *x_RK.shape, w1.shape[0], w2.shape[0], parameters=w1.dtype,
    )  # fmt: skip
    return grads


_dispatch.register(
    "mlp", "cpu", _forward, _backward, missing=missing,
    refuses=lambda x, *_: refuses(x),
    refuses_backward=lambda grad_y, x, *_: refuses(x),
)  # fmt: skip
