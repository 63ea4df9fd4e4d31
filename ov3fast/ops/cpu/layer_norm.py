"""Lays out layer_norm's arguments for csrc/cpu/layer_norm.cpp."""

import torch

from .. import _dispatch
from . import Kernel, empty, pointer, rows, unavailable_reason, unsupported_reason, wide

FORWARD = Kernel(
    "layer_norm_forward",
    "T* x, int64_t x_stride, T* residual, int64_t residual_stride, float* weight, float* bias, double eps, T* y, T* h, "
    "float* mean, float* rstd, int64_t R, int64_t D",
)
BACKWARD = Kernel(
    "layer_norm_backward",
    "T* grad_y, int64_t grad_y_stride, T* grad_h, int64_t grad_h_stride, T* h, int64_t h_stride, float* weight, float* mean, "
    "float* rstd, T* grad_x, float* grad_weight, float* grad_bias, int64_t R, int64_t D",
)


def _forward(x, weight, bias, residual, eps):
    x_RD, residual_RD = rows(x), None if residual is None else rows(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = torch.empty_like(y) if residual is not None else x.new_empty(0)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    FORWARD(
        x.dtype, x_RD, x_RD.stride(0), residual_RD, 0 if residual is None else residual_RD.stride(0),
        wide(weight), wide(bias), float(eps), y, pointer(h, residual is not None), mean, rstd, *x_RD.shape,
    )  # fmt: skip
    return y, h, mean, rstd


def _backward(grad_y, grad_h, h, weight, mean, rstd, need_x, need_weight, need_bias):
    grad_y_RD, grad_h_RD, h_RD = rows(grad_y), None if grad_h is None else rows(grad_h), rows(h)
    grad_x = empty(h, h.shape, need_x)
    grad_weight, grad_bias = (empty(mean, weight.shape, need) for need in (need_weight, need_bias))
    BACKWARD(
        h.dtype, grad_y_RD, grad_y_RD.stride(0), grad_h_RD, 0 if grad_h is None else grad_h_RD.stride(0),
        h_RD, h_RD.stride(0), wide(weight), mean, rstd,
        pointer(grad_x, need_x), pointer(grad_weight, need_weight), pointer(grad_bias, need_bias), *h_RD.shape,
    )  # fmt: skip
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


_dispatch.register(
    "layer_norm", "cpu", _forward, _backward, operands=("x", "weight"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason,
)  # fmt: skip
