"""Lays out layer_norm's arguments for csrc/cpu/layer_norm.cpp."""

import torch

from .. import _dispatch
from . import empty, missing, pointer, refuses, rows, run, wide


def _forward(x, weight, bias, residual, eps):
    x_RD, residual_RD = rows(x), None if residual is None else rows(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = torch.empty_like(y) if residual is not None else x.new_empty(0)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    run(
        "layer_norm_forward", x.dtype, x_RD, x_RD.stride(0), residual_RD, 0 if residual is None else residual_RD.stride(0),
        wide(weight), wide(bias), float(eps), y, pointer(h, residual is not None), mean, rstd, *x_RD.shape,
    )  # fmt: skip
    return y, h, mean, rstd


def _backward(grad_y, grad_h, h, weight, mean, rstd, need_x, need_weight, need_bias):
    grad_y_RD, grad_h_RD, h_RD = rows(grad_y), None if grad_h is None else rows(grad_h), rows(h)
    grad_x = empty(h, h.shape, need_x)
    grad_weight, grad_bias = (empty(mean, weight.shape, need) for need in (need_weight, need_bias))
    run(
        "layer_norm_backward", h.dtype, grad_y_RD, grad_y_RD.stride(0), grad_h_RD, 0 if grad_h is None else grad_h_RD.stride(0),
        h_RD, h_RD.stride(0), wide(weight), mean, rstd,
        pointer(grad_x, need_x), pointer(grad_weight, need_weight), pointer(grad_bias, need_bias), *h_RD.shape,
    )  # fmt: skip
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


_dispatch.register(
    "layer_norm", "cpu", _forward, _backward, missing=missing,
    refuses=lambda x, weight, bias, residual, eps: refuses(x, weight),
    refuses_backward=lambda grad_y, grad_h, h, weight, *_: refuses(h, weight),
)  # fmt: skip
