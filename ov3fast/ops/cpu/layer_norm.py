"""Lays out layer_norm's arguments for csrc/cpu/layer_norm.cpp."""

import torch

from .. import _choice, _dispatch
from . import NO_ROWS, Kernel, empty, empty_like, matrix, pointer, unavailable_reason, unsupported_reason, wide

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
    x_RD, x_stride, *sizes = matrix(x)
    residual_RD, residual_stride, *_ = NO_ROWS if residual is None else matrix(residual)
    y, h = empty_like(x), empty_like(x, residual is not None)
    mean = empty(x, x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    FORWARD(
        x.dtype, x_RD, x_stride, residual_RD, residual_stride,
        wide(weight), wide(bias), float(eps), y, pointer(h, residual is not None), mean, rstd, *sizes,
    )  # fmt: skip
    return y, h, mean, rstd


def _backward(grad_y, grad_h, h, weight, mean, rstd, need_x, need_weight, need_bias):
    grad_y_RD, grad_y_stride, *_ = matrix(grad_y)
    grad_h_RD, grad_h_stride, *_ = NO_ROWS if grad_h is None else matrix(grad_h)
    h_RD, h_stride, *sizes = matrix(h)
    grad_x, wide_weight = empty_like(h, need_x), wide(weight)
    grad_weight, grad_bias = empty_like(wide_weight, need_weight), empty_like(wide_weight, need_bias)
    BACKWARD(
        h.dtype, grad_y_RD, grad_y_stride, grad_h_RD, grad_h_stride, h_RD, h_stride, wide_weight, mean, rstd,
        pointer(grad_x, need_x), pointer(grad_weight, need_weight), pointer(grad_bias, need_bias), *sizes,
    )  # fmt: skip
    if weight.dtype != torch.float32:
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return grad_x, grad_weight, grad_bias


_dispatch.register(
    "layer_norm", "cpu", _forward, _backward, operands=("x", "weight"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("layer_norm"),
)  # fmt: skip
