"""Group normalisation and SiLU, as in front of every convolution of the VAE.

    n_bcs = (x_bcs - mean_bg) * rstd_bg * weight_c + bias_c,    g = c // (C / G),    rstd = 1 / sqrt(var + eps), biased variance
    y_bcs = n_bcs * sigmoid(n_bcs)

Shapes: x, y [B, C, ...] with any number of spatial positions s behind; weight, bias [C]; mean and rstd [B, G] over a group's channels and positions.
Storage float32, bfloat16 or float64 (float16 on GPUs); statistics in float32 (float64 for float64). weight and bias are of x's dtype or
float32. A 4-D channels_last or 5-D channels_last_3d x gives y and dx in that memory format; everything else gives contiguous ones.
Saved for backward: x, weight, bias, mean, rstd; n is computed again.
Source: Wu and He 2018 (arXiv 1803.08494), eq. 7; eps 1e-6 as in diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._contracts import memory_format
from . import _check, _choice, _dispatch, _operator, cpu
from ._calls import Call, Draw


def reference(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch, the specification."""
    wide = _check.accumulate_dtype(x.dtype)
    values = x.to(wide).reshape(x.shape[0], num_groups, x.shape[1:].numel() // num_groups)
    centred = values - values.mean(-1, keepdim=True)
    x_hat = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).view(x.shape)
    per_channel = (-1, *[1] * (x.ndim - 2))
    return F.silu(x_hat * weight.to(wide).reshape(per_channel) + bias.to(wide).reshape(per_channel)).to(x.dtype)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, impl: str | None = None
) -> Tensor:
    """silu(group_norm(x)), of x's shape, dtype and memory format.

    x [B, C, ...]; num_groups divides C; weight and bias [C], of x's dtype or float32. x, weight and bias get gradients. Autocast changes
    nothing here. Raises TypeError or ValueError that name the argument.
    """
    y: Tensor = _group_norm_silu(impl, x, num_groups, weight, bias, eps)[0]
    return y


def _check_arguments(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> None:
    op = "group_norm_silu"
    _check.tensor(op, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [B, C, ...] with at least 2 dimensions, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels of x, got {num_groups}")
    _check.tensor(op, "weight", weight)
    _check.parameter(op, "weight", weight, (channels,), x, "[C]", mixed=True)
    _check.tensor(op, "bias", bias)
    _check.parameter(op, "bias", bias, (channels,), x, "[C]", mixed=True)
    if bias.dtype != weight.dtype:
        raise TypeError(f"{op}: bias must be of weight's dtype {weight.dtype}, got {bias.dtype}")


def _forward_eager(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    # Not aten's native_group_norm, which takes the variance of a channels_last tensor as E[x^2] - E[x]^2 and loses digits by it.
    x_BGcS, weight_GcS, bias_GcS, wide = _grouped(x, num_groups, weight, bias)
    mean = _group_mean(x_BGcS, wide)
    centred = x_BGcS - mean
    rstd = _group_mean(centred.square(), wide).add_(eps).rsqrt_()
    y = torch.ops.aten.silu_(centred.mul_(rstd * weight_GcS).add_(bias_GcS))
    stats = x.shape[0], num_groups
    return _like(x, y), mean.view(stats), rstd.view(stats)


def _backward_eager(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, need_x: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    # Nor its backward, which crashes on channels_last when no gradient of x is asked for.
    groups = mean.shape[1]
    x_BGcS, weight_GcS, bias_GcS, wide = _grouped(x, groups, weight, bias)
    grad_y_BGcS, *_ = _grouped(grad_y.to(wide), groups, weight, bias)
    spatial, per_group = tuple(range(3, x_BGcS.ndim)), (*mean.shape, *[1] * (x_BGcS.ndim - 2))
    mean, rstd = mean.view(per_group), rstd.view(per_group)

    x_hat = (x_BGcS - mean).mul_(rstd)
    grad_n = torch.ops.aten.silu_backward(grad_y_BGcS, (x_hat * weight_GcS).add_(bias_GcS))
    sums = grad_n.sum(spatial, keepdim=True)
    dots = (grad_n * x_hat).sum(spatial, keepdim=True)

    none = x.new_empty(0)
    grad_weight = dots.sum(0).view(-1).to(weight.dtype) if need_weight else none
    grad_bias = sums.sum(0).view(-1).to(weight.dtype) if need_bias else none
    if not need_x:
        return none, grad_weight, grad_bias
    # dx = rstd (w dn - mean_g(w dn) - x_hat mean_g(w dn x_hat)), the means being over the values of a group.
    size = x_BGcS.shape[2:].numel()
    mean_sum = (sums * weight_GcS).sum(2, keepdim=True).div_(size)
    mean_dot = (dots * weight_GcS).sum(2, keepdim=True).div_(size)
    grad_x = grad_n.mul_(weight_GcS).sub_(mean_sum).addcmul_(x_hat, mean_dot, value=-1).mul_(rstd)
    return _like(x, grad_x), grad_weight, grad_bias


def _grouped(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """x [B, C, ...] as [B, G, c, ...] with at least one spatial axis, weight and bias to go with it, and the dtype to compute in."""
    wide = _check.accumulate_dtype(x.dtype)
    per_group = x.shape[1] // groups
    view = x.unflatten(1, (groups, per_group))
    view = view if x.ndim > 2 else view[..., None]
    affine = (groups, per_group, *[1] * (view.ndim - 3))
    return view, weight.to(wide).reshape(affine), bias.to(wide).reshape(affine), wide


def _group_mean(value_BGcS: Tensor, wide: torch.dtype) -> Tensor:
    """Over the spatial axes first: one reduction over all would add a channels_last tensor up in one long chain."""
    return value_BGcS.mean(tuple(range(3, value_BGcS.ndim)), keepdim=True, dtype=wide).mean(2, keepdim=True)


def _like(x: Tensor, value: Tensor) -> Tensor:
    """`value` in x's shape, dtype and memory format."""
    return value.reshape(x.shape).to(x.dtype).contiguous(memory_format=memory_format(x))


def _fake(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    stats = x.new_empty(x.shape[0], num_groups, dtype=_check.accumulate_dtype(x.dtype))
    return torch.empty_like(x, memory_format=memory_format(x)), stats, torch.empty_like(stats)


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, need_x: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        torch.empty_like(x, memory_format=memory_format(x)) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else x.new_empty(0),
        weight.new_empty(weight.shape) if need_bias else x.new_empty(0),
    )


def _specification(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return (reference(x, num_groups, weight, bias, eps),)


def _differentiable_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    # eps, which the backward does not get, is 1 / rstd^2 less the variance: with it the specification's rstd has the value at hand.
    wide, shape = mean.dtype, x.shape

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x_BGn = x.to(wide).reshape(*mean.shape, -1)
        centred = x_BGn - x_BGn.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        eps = rstd[..., None].detach() ** -2 - variance.detach()
        x_hat = (centred * torch.rsqrt(variance + eps)).view(shape)
        per_channel = (-1, *[1] * (x.ndim - 2))
        return F.silu(x_hat * weight.to(wide).reshape(per_channel) + bias.to(wide).reshape(per_channel)).to(x.dtype)

    return _operator.gradients(forward, (x, weight, bias), grad_y)


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    x, _, weight, bias, _ = inputs
    return _operator.Saved((x, weight, bias, *output[1:]), constants=output[1:])


_dispatch.register("group_norm_silu", "eager", _forward_eager, _backward_eager)
_group_norm_silu = _operator.define(
    "group_norm_silu",
    "(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fake,
    check=_check_arguments,
    specification=_specification,
    save=_save,
    gradients={"x": 0, "weight": 1, "bias": 2},
    backward_schema="(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,"
    " bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
    alignment_matters=True,
)


# ---- the CPU kernels, csrc/cpu/group_norm_silu.cpp

_FORWARD = cpu.Kernel(
    "group_norm_silu_forward",
    "T* x, int64_t x_batch, int64_t x_channel, float* weight, float* bias, double eps, T* y, float* mean, float* rstd, "
    "int64_t channels_last, int64_t B, int64_t C, int64_t S, int64_t G",
)
_BACKWARD = cpu.Kernel(
    "group_norm_silu_backward",
    "T* grad_y, int64_t grad_y_batch, int64_t grad_y_channel, T* x, int64_t x_batch, int64_t x_channel, float* weight, "
    "float* bias, float* mean, float* rstd, T* grad_x, float* grad_weight, float* grad_bias, int64_t channels_last, "
    "int64_t B, int64_t C, int64_t S, int64_t G",
)


def _layout_of(x: Tensor) -> tuple[int, tuple[int, int, int]]:
    """Whether x is laid out channels last, and its sizes B, C and S, the number of spatial positions."""
    spatial = x.shape[2:].numel()
    channels_last = memory_format(x) != torch.contiguous_format or (spatial == 1 and x.is_contiguous())
    return int(channels_last), (*x.shape[:2], spatial)


def _layout(x: Tensor, channels_last: int, sizes: tuple[int, ...], like: Tensor) -> tuple[Tensor, int, int]:
    """x with its strides over batches and channels, as the kernel takes it; no copy where the layout allows."""
    if channels_last:
        x = x.contiguous(memory_format=memory_format(like))
        return x, sizes[1] * sizes[2], 1
    x = x.reshape(sizes)
    if x.stride(2) != 1 and sizes[2] > 1:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def _forward_cpu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    channels_last, sizes = _layout_of(x)
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.shape[1] == 0:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    _FORWARD(
        x.dtype, *_layout(x, channels_last, sizes, x), cpu.wide(weight), cpu.wide(bias), float(eps),
        y, mean, rstd, channels_last, *sizes, num_groups,
    )  # fmt: skip
    return y, mean, rstd


def _backward_cpu(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, need_x: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    channels_last, sizes = _layout_of(x)
    none = x.new_empty(0)
    grad_x = torch.empty_like(x, memory_format=memory_format(x)) if need_x else none
    grad_weight, grad_bias = (cpu.wide(torch.empty_like(weight, dtype=torch.float32)) for _ in range(2))
    if x.shape[1] > 0:
        _BACKWARD(
            x.dtype, *_layout(grad_y, channels_last, sizes, x), *_layout(x, channels_last, sizes, x),
            cpu.wide(weight), cpu.wide(bias), cpu.wide(mean), cpu.wide(rstd), cpu.pointer(grad_x, need_x), grad_weight, grad_bias,
            channels_last, *sizes, mean.shape[1],
        )  # fmt: skip
    grads = (grad_weight, need_weight), (grad_bias, need_bias)
    return grad_x, *(grad.to(weight.dtype) if need else none for grad, need in grads)


cpu.register(
    "group_norm_silu",
    _forward_cpu,
    _backward_cpu,
    operands=("x", "weight"),
    **_choice.by_evidence(
        "group_norm_silu", "samples, channels, pixels", lambda x, weight: (x, weight, (x.shape[0], x.shape[1], x[0, 0].numel()))
    ),
)


# ---- how it is called


def _arguments(draw: Draw, batch: int, channels: int, height: int, width: int) -> list[Tensor]:
    return [draw(batch, channels, height, width), draw(channels) + 1, draw(channels)]


def _channels_last(draw: Draw, *size: int) -> list[Tensor]:
    x, weight, bias = _arguments(draw, *size)
    return [x.contiguous(memory_format=torch.channels_last), weight, bias]


CALLS = [
    Call(
        "group_norm_silu", group_norm_silu, reference, arguments, label=label,
        apply=lambda f, x, weight, bias: f(x, next(groups for groups in (32, 4, 2) if x.shape[1] % groups == 0), weight, bias),
        least=(2, 6, 3, 2), tiny=(2, 12, 13, 11), real=(4, 128, 128, 128), measured=measured,
        counted=lambda batch, channels, height, width: (batch, channels, height * width), refused=refused,
    )
    for arguments, label, measured, refused in (
        (_arguments, "", (), {"cuda": (torch.float32, torch.bfloat16, torch.float16)}),
        (_channels_last, "channels_last", ((8, 64, 64, 64), (1, 128, 256, 256)), {}),
    )
]  # fmt: skip
