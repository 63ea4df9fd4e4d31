"""Noise injection and the projection behind it: the reconstruction branch's way in, without a stored noise tensor.

    x_bnk = z_bnk + sigma_b eps_bnk        y_bnd = sum_k x_bnk W_dk + bias_d

    dz = dy W      dsigma_b = sum_nk dz_bnk eps_bnk      dW_dk = sum_bn dy_bnd x_bnk      dbias_d = sum_bn dy_bnd

Shapes: z [B, ..., K], e.g. [B, N, K] or [B, K]; sigma [B]; weight [D, K]; bias [D]; y [B, ..., D]. Storage float32, bfloat16 or float64
(float16 on GPUs); sigma is of z's dtype or float32. x is formed in float32 (float64 for float64) and rounded to z's dtype.
eps_i is element i of `ops.random.normal(z.shape, rng)`. Saved for backward: z, sigma, weight, rng; the noise is drawn again, and only where
dsigma or dW is asked for.
Source: OpenVision 3, eq. 3 (x~ = x + sigma eps, one sigma per instance).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _flops, _operator, cpu, random
from ._calls import Call, Draw


def reference(z: Tensor, sigma: Tensor, weight: Tensor, bias: Tensor | None = None, *, rng: Tensor) -> Tensor:
    """Plain PyTorch, the specification."""
    noise = random.reference(z.shape, rng, z.dtype)
    return F.linear(z + _per_instance(sigma, z).to(z.dtype) * noise, weight, bias)


def noise_projection(
    z: Tensor,
    sigma: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rng: Tensor,
    impl: str | None = None,
) -> Tensor:
    """(z + sigma_b eps) W^T + bias, [B, ..., D].

    z [B, ..., K]; sigma [B], of z's dtype or float32; weight [D, K] and bias [D], of z's dtype; rng an int64 tensor (seed, offset). z, sigma,
    weight and bias get gradients. Under autocast all but sigma are cast. Raises TypeError or ValueError that name the argument.
    """
    y: Tensor = _noise_projection(impl, z, sigma, weight, bias, rng)
    return y


def _check_arguments(z: Tensor, sigma: Tensor, weight: Tensor, bias: Tensor | None, rng: Tensor) -> None:
    op = "noise_projection"
    _check.tensor(op, "z", z)
    if z.ndim < 2:
        raise ValueError(f"{op}: z must be [B, ..., K] with at least 2 dimensions, got shape {tuple(z.shape)}")
    _check.tensor(op, "weight", weight, ndim=2)
    _check.parameter(op, "sigma", sigma, (z.shape[0],), z, "[B], one value per instance of z", mixed=True)
    _check.parameter(op, "weight", weight, (weight.shape[0], z.shape[-1]), z, "[D, K]")
    _check.parameter(op, "bias", bias, (weight.shape[0],), z, "[D]")
    _check.rng(op, rng)
    _check.same_device(op, "rng", rng, z)


def _per_instance(sigma: Tensor, z: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (z.ndim - 1))


def _noisy(z: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """z + sigma eps in noise's wide dtype, rounded to z's; contiguous as the noise is, whatever z's layout."""
    return (noise * _per_instance(sigma, z)).add_(z).to(z.dtype)


def _forward_eager(z: Tensor, sigma: Tensor, weight: Tensor, bias: Tensor | None, rng: Tensor) -> Tensor:
    # The reference rounds the noise to z's dtype first; in bfloat16 that would cost a digit of x.
    noise = random.reference(z.shape, rng, _check.accumulate_dtype(z.dtype))
    return F.linear(_noisy(z, sigma, noise), weight, bias)


def _backward_eager(
    grad_y: Tensor, z: Tensor, sigma: Tensor, weight: Tensor, rng: Tensor, need_z: bool, need_sigma: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_rows = grad_y.reshape(z[..., 0].numel(), weight.shape[0])
    grad_z = grad_sigma = grad_weight = none = grad_y.new_empty(0)
    if need_sigma or need_weight:
        noise = random.reference(z.shape, rng, _check.accumulate_dtype(z.dtype))
    if need_weight:
        grad_weight = grad_rows.t() @ _noisy(z, sigma, noise).view(grad_rows.shape[0], weight.shape[1])
    if need_z or need_sigma:
        grad_z = (grad_rows @ weight).view(z.shape)
    if need_sigma:
        grad_sigma = noise.mul_(grad_z).flatten(1).sum(1).to(sigma.dtype)
    grad_bias = grad_rows.sum(0) if need_bias else none
    return grad_z if need_z else none, grad_sigma, grad_weight, grad_bias


def _fake(z: Tensor, sigma: Tensor, weight: Tensor, bias: Tensor | None, rng: Tensor) -> Tensor:
    return z.new_empty(*z.shape[:-1], weight.shape[0])


def _fake_backward(
    grad_y: Tensor, z: Tensor, sigma: Tensor, weight: Tensor, rng: Tensor, need_z: bool, need_sigma: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        grad_y.new_empty(z.shape if need_z else 0),
        sigma.new_empty(sigma.shape) if need_sigma else grad_y.new_empty(0),
        grad_y.new_empty(weight.shape if need_weight else 0),
        grad_y.new_empty(weight.shape[0] if need_bias else 0),
    )


def _specification(z: Tensor, sigma: Tensor, weight: Tensor, bias: Tensor | None, rng: Tensor) -> Tensor:
    return reference(z, sigma, weight, bias, rng=rng)


def _differentiable_backward(
    grad_y: Tensor, z: Tensor, sigma: Tensor, weight: Tensor, rng: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    return _operator.gradients(
        lambda *inputs: reference(*inputs, rng=rng), (z, sigma, weight, weight.new_zeros(weight.shape[0])), grad_y
    )


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    z, sigma, weight, _, rng = inputs
    return _operator.Saved((z, sigma, weight, rng))


_dispatch.register("noise_projection", "eager", _forward_eager, _backward_eager)
_noise_projection = _operator.define(
    "noise_projection",
    "(Tensor z, Tensor sigma, Tensor weight, Tensor? bias, Tensor rng) -> Tensor",
    fake=_fake,
    check=_check_arguments,
    autocast=("z", "weight", "bias"),
    specification=_specification,
    save=_save,
    gradients={"z": 0, "sigma": 1, "weight": 2, "bias": 3},
    backward_schema="(Tensor grad_y, Tensor z, Tensor sigma, Tensor weight, Tensor rng,"
    " bool need_z, bool need_sigma, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
)


# ---- its products, for FlopCounterMode


def _flops_forward(z: _flops.Shape, sigma: Any, weight: _flops.Shape, *_: Any) -> int:
    return _flops.product(z, weight)


def _flops_backward(
    grad_y: Any, z: _flops.Shape, sigma: Any, weight: _flops.Shape, rng: Any, need_z: bool, need_sigma: bool, need_weight: bool,
    *_: Any,
) -> int:  # fmt: skip
    return ((need_z or need_sigma) + need_weight) * _flops.product(z, weight)


_flops.counts("noise_projection", _flops_forward, _flops_backward)


# ---- the CPU kernels, csrc/cpu/noise_projection.cpp

_FORWARD = cpu.Kernel(
    "noise_projection_forward",
    "T* z, int64_t batch_stride, int64_t row_stride, float* sigma, T* w, int64_t w_stride, T* bias, int64_t* rng, T* y, "
    "int64_t B, int64_t N, int64_t K, int64_t D",
)
_BACKWARD = cpu.Kernel(
    "noise_projection_backward",
    "T* grad_y, int64_t grad_stride, T* z, int64_t batch_stride, int64_t row_stride, float* sigma, T* w, int64_t w_stride, "
    "int64_t* rng, T* grad_z, float* grad_sigma, T* grad_w, T* grad_bias, int64_t B, int64_t N, int64_t K, int64_t D",
)


def _instances(z: Tensor) -> Tensor:
    """[B, ..., K] -> [B, N, K] whose last axis is contiguous."""
    return cpu.unit_stride(z.reshape(z.shape[0], z.shape[1:-1].numel(), z.shape[-1]))


def _forward_cpu(z: Tensor, sigma: Tensor, weight: Tensor, bias: Tensor | None, rng: Tensor) -> Tensor:
    z_BNK, weight = _instances(z), cpu.rows(weight)
    y = cpu.empty(z, (*z.shape[:-1], weight.shape[0]))
    _FORWARD(
        z.dtype, z_BNK, z_BNK.stride(0), z_BNK.stride(1), cpu.wide(sigma), weight, weight.stride(0),
        cpu.dense(bias), rng.contiguous(), y, *z_BNK.shape, weight.shape[0],
    )  # fmt: skip
    return y


def _backward_cpu(
    grad_y: Tensor, z: Tensor, sigma: Tensor, weight: Tensor, rng: Tensor, need_z: bool, need_sigma: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    z_BNK, grad_RD, weight = _instances(z), cpu.rows(grad_y), cpu.rows(weight)
    grad_z, grad_weight = cpu.empty(z, z.shape, need_z), cpu.empty(z, weight.shape, need_weight)
    grad_bias = cpu.empty(z, weight.shape[:1], need_bias)
    wide_sigma = cpu.wide(sigma)
    grad_sigma = cpu.empty_like(wide_sigma, need_sigma)
    _BACKWARD(
        z.dtype, grad_RD, grad_RD.stride(0), z_BNK, z_BNK.stride(0), z_BNK.stride(1), wide_sigma,
        weight, weight.stride(0), rng.contiguous(), cpu.pointer(grad_z, need_z), cpu.pointer(grad_sigma, need_sigma),
        cpu.pointer(grad_weight, need_weight), cpu.pointer(grad_bias, need_bias), *z_BNK.shape, weight.shape[0],
    )  # fmt: skip
    return grad_z, grad_sigma.to(sigma.dtype if need_sigma else z.dtype), grad_weight, grad_bias


cpu.register(
    "noise_projection",
    _forward_cpu,
    _backward_cpu,
    operands=("z",),
    **_choice.by_evidence("noise_projection", "rows, width", lambda z: (z, None, (_choice.rows(z), z.shape[-1]))),
)


# ---- how it is called


def _arguments(draw: Draw, batch: int, tokens: int, width: int, features: int) -> list[Tensor]:
    return [
        draw(batch, tokens, width), draw(batch).abs(), draw(features, width, scale=width**-0.5), draw(features),
        random.make_rng(5, 3, device=torch.get_default_device()),
    ]  # fmt: skip


CALLS = [
    Call(
        "noise_projection", noise_projection, reference, _arguments, apply=lambda f, *a: f(*a[:-1], rng=a[-1]),
        least=(2, 3, 4, 5), tiny=(3, 50, 40, 72), real=(64, 256, 768, 768), measured=((48, 16, 192, 192), (256, 16, 768, 768)),
        counted=lambda batch, tokens, width, features: (batch * tokens, width), data=(0, 1), single=(1,),
    )
]  # fmt: skip
