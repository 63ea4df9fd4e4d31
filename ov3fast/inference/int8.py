"""int8 inference on CPUs: linear layers and convolutions as oneDNN's quantised products, everything else in the wide dtype.

    q = clamp(round(x / s) + z, 0, 255)          s, z: one pair per tensor, from the calibration images
    w_q = round(w_ok / t_o)                      t_o = max_k|w_ok| / 127: one per output channel
    y_o = s t_o (sum_k (q_k - z) w_q,ok) + b_o   summed in int32, rounded once to the wide dtype

The first and last products of a tower or autoencoder, norms, attention's scores and softmax, and the residual stream stay in the wide dtype.
Channel ranges are equalised before products that follow a layer norm (SmoothQuant): the norm's weight and bias are divided by, and the product's
columns multiplied by, r_k = sqrt(max|x_k| / max_o|w_ok|), which changes nothing in exact arithmetic (Xiao et al. 2022, arXiv 2211.10438,
eq. 4 with alpha = 1/2). Parameters and state dict are unchanged; the packed weights are made once, beside them.

A norm before a product writes q itself (csrc/cpu), without rounding to the wide dtype in between; anything else is quantised in one pass.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.ops import cpu

LEVELS = 255
SMALLEST = 1e-8
"""Lower bound of ranges and scales, for layers that saw only zeros."""


def unavailable_reason() -> str | None:
    """Why this machine can't run int8, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this build of PyTorch has no quantised oneDNN operators"
    if not torch.cpu._is_vnni_supported():
        return "int8 products need a chip with VNNI instructions"
    return None


class Range:
    """An input's observed range per channel: of the last axis, or of axis 1 for images."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def see(self, x: Tensor, axis: int = -1) -> None:
        rows = x.detach().float().movedim(axis, -1).flatten(0, -2)
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def seen(self) -> bool:
        return self.low is not None

    def largest(self) -> Tensor:
        """max|x_k| per channel."""
        assert self.low is not None and self.high is not None
        return torch.maximum(self.low.abs(), self.high.abs())

    def scale_and_zero(self, divided_by: Tensor | float = 1.0) -> tuple[float, int]:
        """uint8 scale and zero point for the range, extended to contain 0."""
        assert self.low is not None and self.high is not None
        low, high = min(float((self.low / divided_by).min()), 0.0), max(float((self.high / divided_by).max()), 0.0)
        scale = max((high - low) / LEVELS, SMALLEST)
        return scale, min(max(round(-low / scale), 0), LEVELS)


_DECLARED = {
    "quantize": "T* x, double scale, int64_t zero, void* q, int64_t n",
    "layer_norm_quantized": "T* x, int64_t x_stride, T* residual, int64_t residual_stride, float* weight, float* bias, double eps, "
    "double scale, int64_t zero, void* y, T* h, int64_t R, int64_t D",
    "group_norm_silu_quantized": "T* x, int64_t x_batch, float* weight, float* bias, double eps, double scale, int64_t zero, void* y, "
    "int64_t B, int64_t C, int64_t S, int64_t G",
}
"""The CPU kernels of this file, by name."""


@functools.cache
def kernel(name: str) -> cpu.Kernel:
    """Declared at its first call, since only int8 needs it; RuntimeError if the libraries were built from other sources."""
    library, declared = cpu._library(cpu.isa()), cpu.Kernel(name, _DECLARED[name])
    try:
        declared.check(library)
    except RuntimeError:
        del cpu.KERNELS[name]  # the other kernels still work
        raise
    return declared


@functools.cache
def _built() -> bool:
    try:
        return all(map(kernel, _DECLARED))
    except RuntimeError:
        return False


def has_kernels(x: Tensor) -> bool:
    """Whether this file's CPU kernels were built and support x; PyTorch's operators do the same in more passes."""
    return cpu.unavailable_reason() is None and x.dtype in (torch.float32, torch.bfloat16) and x.is_cpu and _built()


def quantize_activation(x: Tensor, scale: float, zero: int) -> Tensor:
    """uint8 in x's shape and memory format, rounded to nearest even and saturated; uint8 input is returned unchanged."""
    if x.dtype == torch.uint8:
        return x
    if has_kernels(x):
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        x = x if dense else x.contiguous()
        q = torch.empty_like(x, dtype=torch.uint8)
        kernel("quantize")(x.dtype, x, scale, zero, q, x.numel())
        return q
    made = _quint8(x.float(), scale, zero)
    return torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage(), 0, made.shape, made.stride())


def _quint8(x: Tensor, scale: float, zero: int) -> Tensor:
    # One pass; plain arithmetic takes five. PyTorch warns once that quantised tensors are deprecated.
    global _warned
    if _warned:
        return torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _warned = True
        return torch.quantize_per_tensor(x, scale, zero, torch.quint8)


_warned = False


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[O, ...] -> (int8 of that shape, float32 scales [O])."""
    wide = weight.detach().float()
    scales = (wide.flatten(1).abs().amax(1) / 127).clamp_min(SMALLEST)
    return torch.round(wide / scales.view(-1, *[1] * (wide.ndim - 1))).to(torch.int8), scales


def evened(largest: Tensor, weight: Tensor) -> Tensor:
    """r_k for inputs with max|x_k| = `largest` that go into the weight [O, K]."""
    columns = weight.detach().float().abs().amax(0)
    return (largest.clamp_min(SMALLEST) / columns.clamp_min(SMALLEST)).sqrt().clamp(1e-2, 1e2)


class QuantizedLinear:
    """activation(x weight^T + bias) in `dtype`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale_and_zero: tuple[float, int], dtype: torch.dtype) -> None:
        quantized, self.scales = quantize_weight(weight)
        self.weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.zeros = torch.zeros(len(quantized), dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float()
        self.input, self.dtype = scale_and_zero, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(quantize_activation(x, *self.input))

    def product(self, q: Tensor, out: tuple[float, int] | None = None, activation: tuple[str, str] = ("none", "")) -> Tensor:
        """The product for an already quantised input. out: scale and zero point for a uint8 result; None: a result in the wide dtype."""
        (scale, zero), dtype = out or (1.0, 0), self.dtype if out is None else torch.uint8
        name, algorithm = activation
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            q, *self.input, self.weight, self.scales, self.zeros, self.bias, scale, zero, dtype, name, [], algorithm
        )
        return y


class QuantizedNorm:
    """(layer_norm(x + residual) as uint8, x + residual); the latter is x if there is no residual."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, scale_and_zero: tuple[float, int]) -> None:
        self.weight, self.eps, self.output = weight.detach().float().contiguous(), eps, scale_and_zero
        self.bias = None if bias is None else bias.detach().float().contiguous()

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if not has_kernels(x):
            normed = ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual)
            y, h = (normed, x) if isinstance(normed, Tensor) else normed
            return quantize_activation(y, *self.output), h
        x_RD, x_stride, *sizes = cpu.matrix(x)
        residual_RD, residual_stride, *_ = cpu.NO_ROWS if residual is None else cpu.matrix(residual)
        q, h = torch.empty(x.shape, dtype=torch.uint8), cpu.empty_like(x, residual is not None)
        kernel("layer_norm_quantized")(
            x.dtype, x_RD, x_stride, residual_RD, residual_stride, self.weight, self.bias, self.eps, *self.output,
            q, cpu.pointer(h, residual is not None), *sizes,
        )  # fmt: skip
        return q, x if residual is None else h


def group_norm_silu_quantized(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, scale_and_zero: tuple[float, int]
) -> Tensor:
    """silu(group_norm(x)) as uint8, for channels_last x [B, C, H, W] that `has_kernels` supports."""
    batch, channels, height, width = x.shape
    q = torch.empty_like(x, dtype=torch.uint8)
    kernel("group_norm_silu_quantized")(
        x.dtype, x, channels * height * width, cpu.wide(weight), cpu.wide(bias), eps, *scale_and_zero,
        q, batch, channels, height * width, num_groups,
    )  # fmt: skip
    return q


class QuantizedConvolution:
    """conv2d in `dtype`, channels-last."""

    def __init__(self, conv: nn.Conv2d, scale_and_zero: tuple[float, int], shape: list[int], dtype: torch.dtype) -> None:
        quantized, self.scales = quantize_weight(conv.weight)
        self.geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        self.weight = torch.ops.onednn.qconv_prepack(quantized, self.scales, *scale_and_zero, *self.geometry, shape)
        self.zeros = torch.zeros(conv.out_channels, dtype=torch.int32)
        self.bias = None if conv.bias is None else conv.bias.detach().float()
        self.input, self.dtype = scale_and_zero, dtype

    def __call__(self, x: Tensor) -> Tensor:
        q = quantize_activation(x.contiguous(memory_format=torch.channels_last), *self.input)
        y: Tensor = torch.ops.onednn.qconv_pointwise(
            q, *self.input, self.weight, self.scales, self.zeros, self.bias, *self.geometry, 1.0, 0, self.dtype, "none", [], ""
        )
        return y
