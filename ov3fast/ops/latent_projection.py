"""Tokens to latents: the decoder's linear head and the rearrangement of its patches into a picture.

    x_b,c,(i p + u),(j p + v) = sum_d t_bnd W_kd + bias_k,    n = i w + j,  k = (c, u, v) = (c p + u) p + v

Shapes: tokens [B, N, D], N = h w for grid (h, w); weight [C p p, D] (nn.Linear); bias [C p p]; x [B, C, h p, w p]. Rows k are in the order
in which patch_embed reads a patch, so the two are each other's inverse layout. Storage float32, bfloat16 or float64 (float16 on GPUs).
Saved for backward: tokens, weight.
Source: OpenVision 3, section 3 (the reconstruction branch's linear output).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import _check, _choice, _dispatch, _flops, _operator, cpu
from ._calls import Call
from ._patches import from_patches, to_patches


def reference(
    tokens: Tensor, weight: Tensor, bias: Tensor | None = None, *, patch_size: int = 2, grid: Sequence[int]
) -> Tensor:
    """Plain PyTorch, the specification."""
    return from_patches(F.linear(tokens, weight, bias), patch_size, (grid[0], grid[1]))


def latent_projection(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int = 2,
    grid: Sequence[int],
    impl: str | None = None,
) -> Tensor:
    """Latents [B, C, h*p, w*p] from tokens [B, h*w, D], with grid = (h, w).

    weight [C*p*p, D] and bias [C*p*p], of tokens' dtype, rows in the order (c, dy, dx). All of them get gradients and are cast under
    autocast. Raises TypeError or ValueError that name the argument.
    """
    if len(grid) != 2:
        raise ValueError(f"latent_projection: grid must be (h, w), got {tuple(grid)}")
    x: Tensor = _latent_projection(impl, tokens, weight, bias, patch_size, *grid)
    return x


def _check_arguments(tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid_h: int, grid_w: int) -> None:
    op = "latent_projection"
    _check.tensor(op, "tokens", tokens, ndim=3)
    _check.tensor(op, "weight", weight, ndim=2)
    if patch_size < 1:
        raise ValueError(f"{op}: patch_size must be at least 1, got {patch_size}")
    if grid_h * grid_w != tokens.shape[1]:
        raise ValueError(f"{op}: grid must be (h, w) with h * w = {tokens.shape[1]} tokens, got {(grid_h, grid_w)}")
    if weight.shape[0] % patch_size**2:
        raise ValueError(f"{op}: weight must have a multiple of {patch_size}^2 rows, C*p*p, got {weight.shape[0]}")
    _check.parameter(op, "weight", weight, (weight.shape[0], tokens.shape[-1]), tokens, "[C*p*p, D]")
    _check.parameter(op, "bias", bias, (weight.shape[0],), tokens, "[C*p*p]")


def _forward_eager(tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid_h: int, grid_w: int) -> Tensor:
    return reference(tokens.contiguous(), weight, bias, patch_size=patch_size, grid=(grid_h, grid_w))


def _differentiable(tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid_h: int, grid_w: int) -> Tensor:
    return reference(tokens, weight, bias, patch_size=patch_size, grid=(grid_h, grid_w))


def _backward_eager(
    grad_x: Tensor, tokens: Tensor, weight: Tensor, patch_size: int, need_tokens: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    b, n, d = tokens.shape
    grad_rows = to_patches(grad_x, patch_size).view(b * n, weight.shape[0])
    none = grad_x.new_empty(0)
    return (
        (grad_rows @ weight).view(b, n, d) if need_tokens else none,
        grad_rows.t() @ tokens.reshape(b * n, d) if need_weight else none,
        grad_rows.sum(0) if need_bias else none,
    )


def _fake(tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid_h: int, grid_w: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0], weight.shape[0] // patch_size**2, grid_h * patch_size, grid_w * patch_size)


def _fake_backward(
    grad_x: Tensor, tokens: Tensor, weight: Tensor, patch_size: int, need_tokens: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    return (
        grad_x.new_empty(tokens.shape if need_tokens else 0),
        grad_x.new_empty(weight.shape if need_weight else 0),
        grad_x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _specification(tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid_h: int, grid_w: int) -> Tensor:
    return reference(tokens, weight, bias, patch_size=patch_size, grid=(grid_h, grid_w))


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    tokens, weight, _, patch_size, _, _ = inputs
    return _operator.Saved((tokens, weight), (patch_size,))


_dispatch.register("latent_projection", "eager", _forward_eager, _backward_eager, differentiable=lambda *_: _differentiable)
_latent_projection = _operator.define(
    "latent_projection",
    "(Tensor tokens, Tensor weight, Tensor? bias, int patch_size, SymInt grid_h, SymInt grid_w) -> Tensor",
    fake=_fake,
    check=_check_arguments,
    autocast=("tokens", "weight", "bias"),
    specification=_specification,
    save=_save,
    gradients={"tokens": 0, "weight": 1, "bias": 2},
    backward_schema="(Tensor grad_x, Tensor tokens, Tensor weight, int patch_size,"
    " bool need_tokens, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_backward_eager,
)


# ---- its products, for FlopCounterMode


def _flops_forward(tokens: _flops.Shape, weight: _flops.Shape, *_: Any) -> int:
    return _flops.product(tokens, weight)


def _flops_backward(
    grad_x: Any, tokens: _flops.Shape, weight: _flops.Shape, patch_size: int, need_tokens: bool, need_weight: bool, *_: Any
) -> int:
    return (need_tokens + need_weight) * _flops.product(tokens, weight)


_flops.counts("latent_projection", _flops_forward, _flops_backward)


# ---- the CPU kernels, csrc/cpu/latent_projection.cpp

_FORWARD = cpu.Kernel(
    "latent_projection_forward",
    "T* tokens, int64_t batch_stride, int64_t row_stride, T* w, int64_t w_stride, T* bias, T* x, int64_t B, int64_t C, "
    "int64_t p, int64_t h, int64_t wide, int64_t D",
)
_BACKWARD = cpu.Kernel(
    "latent_projection_backward",
    "T* grad_x, int64_t x_batch_stride, int64_t channel_stride, int64_t line_stride, T* tokens, int64_t batch_stride, "
    "int64_t row_stride, T* w, int64_t w_stride, T* grad_tokens, T* grad_w, T* grad_bias, int64_t B, int64_t C, int64_t p, "
    "int64_t h, int64_t wide, int64_t D",
)


def _forward_cpu(tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid_h: int, grid_w: int) -> Tensor:
    tokens, weight = cpu.unit_stride(tokens), cpu.rows(weight)
    channels = weight.shape[0] // patch_size**2
    x = cpu.empty(tokens, (tokens.shape[0], channels, grid_h * patch_size, grid_w * patch_size))
    _FORWARD(
        tokens.dtype, tokens, *tokens.stride()[:2], weight, weight.stride(0),
        cpu.dense(bias), x, tokens.shape[0], channels, patch_size, grid_h, grid_w, tokens.shape[2],
    )  # fmt: skip
    return x


def _backward_cpu(
    grad_x: Tensor, tokens: Tensor, weight: Tensor, patch_size: int, need_tokens: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    grad_x, tokens, weight = cpu.unit_stride(grad_x), cpu.unit_stride(tokens), cpu.rows(weight)
    batch, channels, height, width = grad_x.shape
    needs = need_tokens, need_weight, need_bias
    shapes = tokens.shape, weight.shape, weight.shape[:1]
    grads = tuple(cpu.empty(grad_x, shape, need) for shape, need in zip(shapes, needs, strict=True))
    _BACKWARD(
        grad_x.dtype, grad_x, *grad_x.stride()[:3], tokens, *tokens.stride()[:2],
        weight, weight.stride(0), *map(cpu.pointer, grads, needs),
        batch, channels, patch_size, height // patch_size, width // patch_size, tokens.shape[2],
    )  # fmt: skip
    return grads


cpu.register(
    "latent_projection",
    _forward_cpu,
    _backward_cpu,
    operands=("tokens", "weight"),
    **_choice.by_evidence(
        "latent_projection",
        "rows, width, outputs",
        lambda tokens, weight: (tokens, weight, (_choice.rows(tokens), *weight.shape[::-1])),
        products="eager",
    ),
)


# ---- how it is called

CALLS = [
    Call(
        "latent_projection", latent_projection, reference,
        lambda draw, batch, side, width, channels: [
            draw(batch, side * side, width), draw(4 * channels, width, scale=width**-0.5), draw(4 * channels),
        ],
        apply=lambda f, tokens, weight, bias: f(tokens, weight, bias, grid=(math.isqrt(tokens.shape[1]),) * 2),
        least=(2, 2, 5, 2), tiny=(3, 6, 40, 4), real=(64, 16, 768, 16), measured=((3, 16, 192, 16), (64, 16, 768, 16)),
        counted=lambda batch, side, width, channels: (batch * side * side, width, 4 * channels),
    )
]  # fmt: skip
