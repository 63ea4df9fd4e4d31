"""Latents to tokens: posterior sampling, the latent convention's affine map, patches, projection, CLS token and position embedding.

    z_bcyx = mean_bcyx + exp(clamp(logvar_bcyx, -30, 20) / 2) * eps_bcyx    (moments with rng; else the mean, or the latents themselves)
    y_bnd  = sum_k W_dk ((z - shift) * scale)_bnk + bias_d + pos_(t+n)d     k = (c, dy, dx) within patch n, grid row-major
    y_b0d  = cls_d + pos_0d                                                 with a CLS token, then t = 1, else t = 0

Shapes: latents [B, C, H, W] or moments [B, 2C, H, W] (mean, logvar along the channels); weight [D, C p p] (nn.Linear) or
[D, C, p, p] (nn.Conv2d); bias, cls_token [D]; pos_embed [(1+)N, D], N = (H/p)(W/p); y [B, (1+)N, D]. Storage float32, bfloat16 or
float64 (float16 on GPUs). Latents are of weight's dtype or float32, and are sampled and mapped in at least float32 before they are rounded
to weight's dtype, which the rest and the result have. eps_i is element i of `ops.random.normal([B, C, H, W], rng)`.
Saved for backward: latents, weight, rng; the noise is drawn again.
Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), eq. 1; diffusers' DiagonalGaussianDistribution for the sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _flops, _operator, cpu, random
from ._calls import Call, Draw
from ._patches import from_patches, to_patches


def reference(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    patch_size: int = 2,
    scale: float = 1.0,
    shift: float = 0.0,
    moments: bool = False,
    rng: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, the specification."""
    z = latents
    if moments:
        z, logvar = latents.chunk(2, dim=1)
        if rng is not None:
            z = z + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * random.reference(z.shape, rng, z.dtype)
    z = ((z - shift) * scale).to(weight.dtype)
    y = F.linear(to_patches(z, patch_size), weight.flatten(1), bias)
    if cls_token is not None:
        y = torch.cat([cls_token.expand(y.shape[0], 1, -1), y], dim=1)
    return y if pos_embed is None else y + pos_embed


def patch_embed(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    *,
    patch_size: int = 2,
    scale: float = 1.0,
    shift: float = 0.0,
    moments: bool = False,
    rng: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Tokens [B, (1+)N, D] from latents [B, C, H, W], or from moments [B, 2C, H, W] (mean, logvar) with `moments`.

    weight [D, C p p] or [D, C, p, p]; bias and cls_token [D], of weight's dtype; pos_embed [(1+)N, D], of weight's dtype, added behind
    the CLS token's concatenation. z becomes (z - shift) * scale. Moments are sampled with rng, an int64 tensor (seed, offset); without
    rng their mean is taken. All tensors but rng get gradients. Under autocast the weights are cast, the latents keep their dtype.
    Raises TypeError or ValueError that name the argument.
    """
    if isinstance(weight, Tensor) and weight.ndim == 4 and isinstance(latents, Tensor) and latents.ndim == 4:
        channels, _ = _check_sizes("patch_embed", latents, patch_size, moments)
        expected = weight.shape[0], channels, patch_size, patch_size
        _check.shape("patch_embed", "weight", weight, expected, "[D, C, p, p]")
        weight = weight.flatten(1)
    y: Tensor = _patch_embed(
        impl, latents, weight, bias, pos_embed, cls_token, rng, patch_size, float(scale), float(shift), moments
    )
    return y


def _check_arguments(
    latents: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, cls_token: Tensor | None, rng: Tensor | None,
    patch_size: int, scale: float, shift: float, moments: bool,
) -> None:  # fmt: skip
    op = "patch_embed"
    _check.tensor(op, "latents", latents, ndim=4)
    _check.tensor(op, "weight", weight)
    channels, tokens = _check_sizes(op, latents, patch_size, moments)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight must be [D, C*p*p] or [D, C, p, p], got shape {tuple(weight.shape)}")
    width = weight.shape[0]
    _check.shape(op, "weight", weight, (width, channels * patch_size**2), f"[D, C*p*p] for {channels} latent channels")
    if latents.dtype not in (weight.dtype, torch.float32):
        raise TypeError(f"{op}: latents must be of weight's dtype {weight.dtype} or float32, got {latents.dtype}")
    _check.same_device(op, "weight", weight, latents)
    _check.parameter(op, "bias", bias, (width,), weight, "[D]")
    _check.parameter(op, "cls_token", cls_token, (width,), weight, "[D]")
    if cls_token is None:
        _check.parameter(op, "pos_embed", pos_embed, (tokens, width), weight, "[N, D] without a CLS token")
    else:
        _check.parameter(op, "pos_embed", pos_embed, (1 + tokens, width), weight, "[1 + N, D] with a CLS token")
    if rng is not None:
        _check.rng(op, rng)
        _check.same_device(op, "rng", rng, latents)
        if not moments:
            raise ValueError(f"{op}: rng samples from moments, but moments is False; drop rng, or pass moments=True")


def _check_sizes(op: str, latents: Tensor, patch_size: int, moments: bool) -> tuple[int, int]:
    """Channels of z and tokens N."""
    if patch_size < 1:
        raise ValueError(f"{op}: patch_size must be at least 1, got {patch_size}")
    _, channels, height, width = latents.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"{op}: height and width of latents must be multiples of patch_size {patch_size}, got {height} x {width}"
        )
    if moments and channels % 2:
        raise ValueError(f"{op}: moments have mean and logvar, an even number of channels, got {channels}")
    return channels // 2 if moments else channels, (height // patch_size) * (width // patch_size)


def _forward_eager(
    latents: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, cls_token: Tensor | None,
    rng: Tensor | None, patch_size: int, scale: float, shift: float, moments: bool,
) -> Tensor:  # fmt: skip
    # Unlike the reference it samples and maps bfloat16 latents in float32, and writes the tokens once: no torch.cat, no second sum.
    y = F.linear(_patches(latents, weight, rng, patch_size, scale, shift, moments), weight, bias)
    if cls_token is None:
        return y if pos_embed is None else y.add_(pos_embed)
    b, n, d = y.shape
    out = y.new_empty(b, 1 + n, d)
    if pos_embed is None:
        out[:, 0], out[:, 1:] = cls_token, y
    else:
        out[:, 0] = cls_token + pos_embed[0]
        torch.add(y, pos_embed[1:], out=out[:, 1:])
    return out


def _backward_eager(
    grad_y: Tensor, latents: Tensor, weight: Tensor, rng: Tensor | None, patch_size: int, scale: float, shift: float,
    moments: bool, need_latents: bool, need_weight: bool, need_bias: bool, need_pos: bool, need_cls: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, _, height, width = latents.shape
    grid = height // patch_size, width // patch_size
    grad_patches = grad_y[:, grad_y.shape[1] - grid[0] * grid[1] :].reshape(-1, weight.shape[0])
    none = grad_y.new_empty(0)
    grad_latents = grad_weight = none
    if need_latents:
        # Explicit sizes: a batch of 0 leaves -1 undetermined.
        rows = (grad_patches @ weight).view(b, grid[0] * grid[1], weight.shape[1])
        grad_latents = _latents_gradient(from_patches(rows, patch_size, grid), latents, rng, scale, moments)
    if need_weight:
        patches = _patches(latents, weight, rng, patch_size, scale, shift, moments)
        grad_weight = grad_patches.t() @ patches.view(grad_patches.shape[0], weight.shape[1])
    return (
        grad_latents,
        grad_weight,
        grad_patches.sum(0) if need_bias else none,
        grad_y.sum(0) if need_pos else none,
        grad_y[:, 0].sum(0) if need_cls else none,
    )


def _patches(
    latents: Tensor, weight: Tensor, rng: Tensor | None, patch_size: int, scale: float, shift: float, moments: bool
) -> Tensor:
    z = latents.chunk(2, dim=1)[0] if moments else latents
    wide = _check.accumulate_dtype(latents.dtype)
    if rng is not None:
        z = (_deviation(latents, wide) * random.reference(z.shape, rng, wide)).add_(z)
    if shift != 0.0 or scale != 1.0:
        z = (z.to(wide) - shift).mul_(scale)
    return to_patches(z.to(weight.dtype), patch_size)


def _deviation(moments: Tensor, wide: torch.dtype) -> Tensor:
    return moments.chunk(2, dim=1)[1].to(wide).clamp(-30.0, 20.0).mul_(0.5).exp_()


def _latents_gradient(grad_z: Tensor, latents: Tensor, rng: Tensor | None, scale: float, moments: bool) -> Tensor:
    wide = _check.accumulate_dtype(latents.dtype)
    grad_mean = grad_z.to(wide).mul_(scale)
    if not moments:
        return grad_mean.to(latents.dtype)
    if rng is None:
        grad_logvar = torch.zeros_like(grad_mean)
    else:
        logvar = latents.chunk(2, dim=1)[1]
        slope = _deviation(latents, wide).mul_(0.5).mul_((logvar >= -30.0) & (logvar <= 20.0))
        grad_logvar = slope.mul_(random.reference(grad_mean.shape, rng, wide)).mul_(grad_mean)
    return torch.cat([grad_mean, grad_logvar], dim=1).to(latents.dtype)


def _fake(
    latents: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, cls_token: Tensor | None,
    rng: Tensor | None, patch_size: int, scale: float, shift: float, moments: bool,
) -> Tensor:  # fmt: skip
    tokens = (latents.shape[2] // patch_size) * (latents.shape[3] // patch_size)
    return weight.new_empty(latents.shape[0], tokens + (cls_token is not None), weight.shape[0])


def _fake_backward(
    grad_y: Tensor, latents: Tensor, weight: Tensor, rng: Tensor | None, patch_size: int, scale: float, shift: float,
    moments: bool, need_latents: bool, need_weight: bool, need_bias: bool, need_pos: bool, need_cls: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        latents.new_empty(latents.shape) if need_latents else grad_y.new_empty(0),
        grad_y.new_empty(weight.shape if need_weight else 0),
        grad_y.new_empty(weight.shape[0] if need_bias else 0),
        grad_y.new_empty(grad_y.shape[1:] if need_pos else 0),
        grad_y.new_empty(weight.shape[0] if need_cls else 0),
    )


def _specification(
    latents: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, cls_token: Tensor | None,
    rng: Tensor | None, patch_size: int, scale: float, shift: float, moments: bool,
) -> Tensor:  # fmt: skip
    return reference(
        latents, weight, bias, pos_embed, cls_token,
        patch_size=patch_size, scale=scale, shift=shift, moments=moments, rng=rng,
    )  # fmt: skip


def _differentiable_backward(
    grad_y: Tensor, latents: Tensor, weight: Tensor, rng: Tensor | None, patch_size: int, scale: float, shift: float,
    moments: bool, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens = (latents.shape[2] // patch_size) * (latents.shape[3] // patch_size)
    with_cls, rest = grad_y.shape[1] > tokens, (rng, patch_size, scale, shift, moments)
    width = grad_y.shape[2:]
    zeros = grad_y.new_zeros(width), grad_y.new_zeros(grad_y.shape[1:]), *([grad_y.new_zeros(width)] if with_cls else [])
    grads = _operator.gradients(
        lambda latents, weight, bias, pos_embed, cls_token=None: _specification(
            latents, weight, bias, pos_embed, cls_token, *rest
        ),
        (latents, weight, *zeros), grad_y,
    )  # fmt: skip
    return grads if with_cls else (*grads, grad_y.new_empty(0))


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    latents, weight, _, _, _, rng, *options = inputs
    return _operator.Saved((latents, weight, rng), tuple(options))


_dispatch.register("patch_embed", "eager", _forward_eager, _backward_eager)
_patch_embed = _operator.define(
    "patch_embed",
    "(Tensor latents, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? cls_token, Tensor? rng,"
    " int patch_size, float scale, float shift, bool moments) -> Tensor",
    fake=_fake,
    check=_check_arguments,
    autocast=("weight", "bias", "pos_embed", "cls_token"),
    specification=_specification,
    save=_save,
    gradients={"latents": 0, "weight": 1, "bias": 2, "pos_embed": 3, "cls_token": 4},
    backward_schema="(Tensor grad_y, Tensor latents, Tensor weight, Tensor? rng, int patch_size, float scale, float shift,"
    " bool moments, bool need_latents, bool need_weight, bool need_bias, bool need_pos_embed, bool need_cls_token)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
)


# ---- its products, for FlopCounterMode


def _patch_product(latents: _flops.Shape, weight: _flops.Shape, patch_size: int) -> int:
    return 2 * latents[0] * (latents[2] // patch_size) * (latents[3] // patch_size) * math.prod(weight)


def _flops_forward(
    latents: _flops.Shape, weight: _flops.Shape, bias: Any, pos_embed: Any, cls_token: Any, rng: Any, patch_size: int, *_: Any
) -> int:
    return _patch_product(latents, weight, patch_size)


def _flops_backward(
    grad_y: Any, latents: _flops.Shape, weight: _flops.Shape, rng: Any, patch_size: int, scale: float, shift: float,
    moments: bool, need_latents: bool, need_weight: bool, *_: Any,
) -> int:  # fmt: skip
    return (need_latents + need_weight) * _patch_product(latents, weight, patch_size)


_flops.counts("patch_embed", _flops_forward, _flops_backward)


# ---- the CPU kernels, csrc/cpu/patch_embed.cpp

_FORWARD = cpu.Kernel(
    "patch_embed_forward",
    "void* latents, int64_t batch_stride, int64_t channel_stride, int64_t line_stride, int64_t is_wide, T* w, "
    "int64_t w_stride, T* bias, T* pos, T* cls, int64_t* rng, double scale, double shift, int64_t moments, T* y, int64_t B, "
    "int64_t C, int64_t p, int64_t h, int64_t wide, int64_t D",
)
_BACKWARD = cpu.Kernel(
    "patch_embed_backward",
    "T* grad_y, int64_t grad_batch_stride, int64_t grad_row_stride, int64_t has_cls, void* latents, int64_t batch_stride, "
    "int64_t channel_stride, int64_t line_stride, int64_t is_wide, T* w, int64_t w_stride, int64_t* rng, double scale, "
    "double shift, int64_t moments, void* grad_latents, T* grad_w, T* grad_bias, T* grad_pos, T* grad_cls, int64_t B, "
    "int64_t C, int64_t p, int64_t h, int64_t wide, int64_t D",
)


def _sizes(latents: Tensor, weight: Tensor, patch_size: int, moments: bool) -> tuple[int, ...]:
    """B, C, p, h, w, D."""
    batch, channels, height, width = latents.shape
    return batch, channels // 2 if moments else channels, patch_size, height // patch_size, width // patch_size, weight.shape[0]


def _forward_cpu(
    latents: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, cls_token: Tensor | None,
    rng: Tensor | None, patch_size: int, scale: float, shift: float, moments: bool,
) -> Tensor:  # fmt: skip
    latents, weight = cpu.unit_stride(latents), cpu.rows(weight)
    batch, _, _, h, w, width = sizes = _sizes(latents, weight, patch_size, moments)
    y = cpu.empty(weight, (batch, h * w + (cls_token is not None), width))
    _FORWARD(
        weight.dtype, latents, *latents.stride()[:3], latents.dtype == torch.float32, weight, weight.stride(0),
        cpu.dense(bias), cpu.dense(pos_embed), cpu.dense(cls_token), cpu.dense(rng), float(scale), float(shift), moments, y, *sizes,
    )  # fmt: skip
    return y


def _backward_cpu(
    grad_y: Tensor, latents: Tensor, weight: Tensor, rng: Tensor | None, patch_size: int, scale: float, shift: float,
    moments: bool, need_latents: bool, need_weight: bool, need_bias: bool, need_pos: bool, need_cls: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_y, latents, weight = cpu.unit_stride(grad_y), cpu.unit_stride(latents), cpu.rows(weight)
    _, _, _, h, w, width = sizes = _sizes(latents, weight, patch_size, moments)
    needs = need_latents, need_weight, need_bias, need_pos, need_cls
    likes = latents if need_latents else grad_y, grad_y, grad_y, grad_y, grad_y
    shapes = latents.shape, weight.shape, (width,), grad_y.shape[1:], (width,)
    grads = tuple(cpu.empty(like, shape, need) for like, shape, need in zip(likes, shapes, needs, strict=True))
    _BACKWARD(
        weight.dtype, grad_y, *grad_y.stride()[:2], grad_y.shape[1] > h * w,
        latents, *latents.stride()[:3], latents.dtype == torch.float32, weight, weight.stride(0), cpu.dense(rng),
        float(scale), float(shift), moments, *map(cpu.pointer, grads, needs), *sizes,
    )  # fmt: skip
    return grads


cpu.register(
    "patch_embed",
    _forward_cpu,
    _backward_cpu,
    operands=("latents", "weight"),
    **_choice.by_evidence(
        "patch_embed",
        "samples, pixels, width",
        lambda latents, weight: (weight, None, (latents.shape[0], latents[0, 0].numel(), weight.shape[0])),
    ),
)


# ---- how it is called


def _arguments(draw: Draw, batch: int, channels: int, side: int, width: int) -> list[Tensor]:
    return [
        draw(batch, channels, side, side), draw(width, 4 * channels, scale=(4 * channels) ** -0.5), draw(width),
        draw(1 + side * side // 4, width), draw(width),
    ]  # fmt: skip


def _moments(draw: Draw, batch: int, channels: int, side: int, width: int) -> list[Tensor]:
    _, *parameters = _arguments(draw, batch, channels, side, width)
    return [draw(batch, 2 * channels, side, side), *parameters, random.make_rng(5, 3, device=torch.get_default_device())]


CALLS = [
    Call(
        "patch_embed", patch_embed, reference, _moments, apply=lambda f, *a: f(*a[:-1], scale=0.36, shift=0.12, moments=True, rng=a[-1]),
        least=(2, 2, 4, 5), tiny=(3, 4, 12, 72), real=(64, 16, 32, 768), data=(0,),
    ),
    Call(
        "patch_embed", patch_embed, reference, _arguments, label="latents",
        least=(2, 2, 4, 5), tiny=(3, 4, 12, 72), real=(64, 16, 32, 768), measured=((144, 16, 8, 192), (64, 16, 32, 768)),
        counted=lambda batch, channels, side, width: (batch, side * side, width), data=(0,), single=(0,),
    ),
]  # fmt: skip
