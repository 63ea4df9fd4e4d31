"""int8 inference on CPUs: linear layers and convolutions by oneDNN's quantised products, everything around them wide.

    q = clamp(round(x / s) + z, 0, 255)          s, z: one pair per tensor, from the calibration images
    w_q = round(w_ok / t_o)                      t_o = max_k|w_ok| / 127: one per output channel
    y_o = s t_o (sum_k (q_k - z) w_q,ok) + b_o   summed in int32, rounded once to the wide dtype

The first and last products of a tower or autoencoder, norms, attention's scores and softmax, and the residual stream stay in the wide dtype.
Before a product that a layer norm feeds, the channels' ranges are evened out: the norm's weight and bias are divided by, and the product's columns multiplied with,
r_k = sqrt(max|x_k| / max_o|w_ok|), which changes nothing in exact arithmetic (Xiao et al. 2022, arXiv 2211.10438, eq. 4 with alpha = 1/2).
The parameters stay where they are, and the state dict as it was; the packed weights beside them are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.models.transformer import Mlp

LEVELS = 255
SMALLEST = 1e-8
"""A range or a scale is at least this: a layer that saw nothing but zeros."""


def unavailable_reason() -> str | None:
    """Why this machine can't, or None."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no quantised oneDNN operators"
    if not torch.cpu._is_vnni_supported():
        return "int8 products need VNNI instructions (AVX-512 VNNI or later), which this chip lacks"
    return None


@dataclass
class Range:
    """What a layer's input was seen to hold."""

    low: float = 0.0
    high: float = 0.0
    largest: Tensor | None = None
    """max|x_k| per channel of the last axis, for linear layers."""

    def see(self, x: Tensor, channels: bool) -> None:
        x = x.detach().float()
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        if channels:
            largest = x.flatten(0, -2).abs().amax(0)
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    @property
    def scale_and_zero(self) -> tuple[float, int]:
        return scale_and_zero(self.low, self.high)


def scale_and_zero(low: float, high: float) -> tuple[float, int]:
    """Of uint8 for [low, high], which holds 0."""
    scale = max((max(high, 0.0) - min(low, 0.0)) / LEVELS, SMALLEST)
    return scale, min(max(round(-min(low, 0.0) / scale), 0), LEVELS)


def quantize_activation(x: Tensor, scale: float, zero: int) -> Tensor:
    """uint8 of x's shape and memory format, rounded to nearest even and saturated."""
    made = torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage(), 0, made.shape, made.stride())


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[O, ...] -> (int8 of that shape, float32 scales [O])."""
    wide = weight.detach().float()
    scales = (wide.flatten(1).abs().amax(1) / 127).clamp_min(SMALLEST)
    return torch.round(wide / scales.view(-1, *[1] * (wide.ndim - 1))).to(torch.int8), scales


class QuantizedLinear:
    """y = linear(x) with packed int8 weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, zero: int) -> None:
        quantized, self.scales = quantize_weight(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float()
        self.scale, self.zero = scale, zero

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.product(quantize_activation(x, self.scale, self.zero), dtype)

    def product(
        self, q: Tensor, dtype: torch.dtype, out: tuple[float, int] = (1.0, 0), activation: tuple[str, str] = ("none", "")
    ) -> Tensor:
        """Of an input that is quantised already; `out` is the scale and zero of a uint8 result."""
        return torch.ops.onednn.qlinear_pointwise(
            q, self.scale, self.zero, self.packed, self.scales, self.zeros, self.bias, *out, dtype, activation[0], [], activation[1]
        )


class QuantizedConvolution:
    """y = conv2d(x) with packed int8 weights; channels-last."""

    def __init__(self, conv: nn.Conv2d, scale: float, zero: int, shape: list[int]) -> None:
        quantized, self.scales = quantize_weight(conv.weight)
        self.geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        self.packed = torch.ops.onednn.qconv_prepack(quantized, self.scales, scale, zero, *self.geometry, shape)
        self.zeros = torch.zeros(conv.out_channels, dtype=torch.int32)
        self.bias = None if conv.bias is None else conv.bias.detach().float()
        self.scale, self.zero = scale, zero

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        q = quantize_activation(x.contiguous(memory_format=torch.channels_last), self.scale, self.zero)
        return torch.ops.onednn.qconv_pointwise(
            q, self.scale, self.zero, self.packed, self.scales, self.zeros, self.bias, *self.geometry, 1.0, 0, dtype, "none", [], ""
        )
