"""Lays out group_norm_silu's arguments for csrc/cpu/group_norm_silu.cpp."""

import torch

from .. import _choice, _dispatch
from ..group_norm_silu import memory_format
from . import Kernel, pointer, unavailable_reason, unsupported_reason, wide

FORWARD = Kernel(
    "group_norm_silu_forward",
    "T* x, int64_t x_batch, int64_t x_channel, float* weight, float* bias, double eps, T* y, float* mean, float* rstd, "
    "int64_t channels_last, int64_t B, int64_t C, int64_t S, int64_t G",
)
BACKWARD = Kernel(
    "group_norm_silu_backward",
    "T* grad_y, int64_t grad_y_batch, int64_t grad_y_channel, T* x, int64_t x_batch, int64_t x_channel, float* weight, "
    "float* bias, float* mean, float* rstd, T* grad_x, float* grad_weight, float* grad_bias, int64_t channels_last, "
    "int64_t B, int64_t C, int64_t S, int64_t G",
)


def _layout_of(x):
    """Whether x is laid out channels last, and its sizes B, C and S, the number of spatial positions."""
    spatial = x.shape[2:].numel()
    channels_last = memory_format(x) != torch.contiguous_format or (spatial == 1 and x.is_contiguous())
    return int(channels_last), (*x.shape[:2], spatial)


def _layout(x, channels_last, sizes, like):
    """x with its strides over batches and channels, as the kernel takes it; no copy where the layout allows."""
    if channels_last:
        x = x.contiguous(memory_format=memory_format(like))
        return x, sizes[1] * sizes[2], 1
    x = x.reshape(sizes)
    if x.stride(2) != 1 and sizes[2] > 1:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def _forward(x, num_groups, weight, bias, eps):
    channels_last, sizes = _layout_of(x)
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.shape[1] == 0:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    FORWARD(
        x.dtype, *_layout(x, channels_last, sizes, x), wide(weight), wide(bias), float(eps),
        y, mean, rstd, channels_last, *sizes, num_groups,
    )  # fmt: skip
    return y, mean, rstd


def _backward(grad_y, x, weight, bias, mean, rstd, need_x, need_weight, need_bias):
    channels_last, sizes = _layout_of(x)
    none = x.new_empty(0)
    grad_x = torch.empty_like(x, memory_format=memory_format(x)) if need_x else none
    grad_weight, grad_bias = (wide(torch.empty_like(weight, dtype=torch.float32)) for _ in range(2))
    if x.shape[1] > 0:
        BACKWARD(
        x.dtype, *_layout(grad_y, channels_last, sizes, x), *_layout(x, channels_last, sizes, x),
            wide(weight), wide(bias), wide(mean), wide(rstd), pointer(grad_x, need_x), grad_weight, grad_bias,
            channels_last, *sizes, mean.shape[1],
        )  # fmt: skip
    grads = (grad_weight, need_weight), (grad_bias, need_bias)
    return grad_x, *(grad.to(weight.dtype) if need else none for grad, need in grads)


_dispatch.register(
    "group_norm_silu", "cpu", _forward, _backward, operands=("x", "weight"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence("group_norm_silu"),
)  # fmt: skip
