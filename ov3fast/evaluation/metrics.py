"""Pixel metrics that carry their protocol: PSNR and SSIM can't be compared without one.

    PSNR_b = 10 log10(1 / mean_chw (x - y)^2)
    SSIM   = (2 mx my + C1)(2 cxy + C2) / ((mx^2 + my^2 + C1)(vx + vy + C2)),   C1 = (0.01 R)^2, C2 = (0.03 R)^2

Images are [B, C, H, W] in [0, 1]; every metric gives one float64 value per image, and a set's value is their mean
(never the PSNR of a pooled error). SSIM is averaged over the windows that lie entirely inside the image, then over channels.
Source: Wang et al. 2004 for SSIM with the Gaussian window 11 / 1.5; the uniform 7 x 7 window with sample covariance is the default
of skimage.metrics.structural_similarity. Both agree with scikit-image to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Window = Literal["gaussian", "uniform"]
WINDOWS: dict[str, int] = {"gaussian": 11, "uniform": 7}
GAUSSIAN_SIGMA = 1.5


@dataclass(frozen=True)
class Metric:
    """A named per-image distance or similarity. Two values may be compared only if their `protocol` is the same."""

    name: str
    protocol: str
    function: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool = True
    unit: str = ""

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """images, reference [B, C, H, W] in [0, 1] -> [B] float64."""
        return self.function(images, reference)


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped, float32."""
    return (images.float() * 0.5 + 0.5).clamp(0, 1)


def round_to_8_bit(images: Tensor) -> Tensor:
    """[0, 1] -> the nearest multiples of 1 / 255, as in a saved image; truncation would cost up to 0.9 dB at 48 dB."""
    return (images.clamp(0, 1) * 255).round() / 255


def psnr(images: Tensor, reference: Tensor, *, rounding: bool = True) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, [B] float64, data range 1; infinite for equal images.

    images, reference [B, C, H, W] in [0, 1]; with `rounding` both are first rounded to 8 bits. ValueError if the shapes differ.
    """
    x, y = _prepare("psnr", images, reference, rounding)
    return -10 * torch.log10((x - y).square().mean(dim=(1, 2, 3)))


def ssim(
    images: Tensor,
    reference: Tensor,
    *,
    window: Window = "gaussian",
    data_range: float = 1.0,
    rounding: bool = True,
) -> Tensor:
    """Structural similarity per image, [B] float64.

    window "gaussian": 11 x 11, sigma 1.5, population covariance; "uniform": 7 x 7, sample covariance. data_range 1 is correct for
    [0, 1]; LlamaGen's evaluation passes 2 for such images, which inflates the result. ValueError for images smaller than the window.
    """
    if window not in WINDOWS:
        raise ValueError(f"ssim: window must be one of {', '.join(WINDOWS)}; got {window!r}")
    x, y = _prepare("ssim", images, reference, rounding)
    size = WINDOWS[window]
    if min(x.shape[2:]) < size:
        raise ValueError(f"ssim: images must be at least {size} x {size} for the {window} window, got {tuple(x.shape[2:])}")
    mx, my, xx, yy, xy = (_blur(v, window) for v in (x, y, x * x, y * y, x * y))
    sample = size**2 / (size**2 - 1) if window == "uniform" else 1.0
    vx, vy, cxy = sample * (xx - mx * mx), sample * (yy - my * my), sample * (xy - mx * my)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return values.mean(dim=(1, 2, 3))


def psnr_metric(rounding: bool = True) -> Metric:
    """PSNR in dB with its protocol id."""
    protocol = f"psnr/range=1/{_rounding(rounding)}/mean-of-images"
    return Metric("psnr", protocol, lambda x, y: psnr(x, y, rounding=rounding), unit="dB")


def ssim_metric(window: Window = "gaussian", data_range: float = 1.0, rounding: bool = True) -> Metric:
    """SSIM with its protocol id; the uniform one is called "ssim_uniform"."""
    kernel = f"gaussian-11-{GAUSSIAN_SIGMA}" if window == "gaussian" else "uniform-7-sample-covariance"
    protocol = f"ssim/{kernel}/range={data_range:g}/{_rounding(rounding)}/rgb-mean/mean-of-images"
    name = "ssim" if window == "gaussian" else f"ssim_{window}"
    return Metric(name, protocol, lambda x, y: ssim(x, y, window=window, data_range=data_range, rounding=rounding))


def lpips_metric(distance: nn.Module, label: str | None = None) -> Metric:
    """A perceptual distance `distance(x, y) -> [B]` on images in [-1, 1] as a metric named "lpips_style".

    label names the network; None takes `distance.backbone` and `distance.preprocess`, which models.perceptual.LPIPS has.
    """
    if label is None:
        label = "-".join(getattr(distance, name) for name in ("backbone", "preprocess") if hasattr(distance, name)) or "unnamed"

    def function(images: Tensor, reference: Tensor) -> Tensor:
        x, y = (round_to_8_bit(v.float()) * 2 - 1 for v in (images, reference))
        return distance(x, y).reshape(len(images)).double()

    protocol = f"lpips-style/{label}/8-bit-rounded/not-comparable-with-published-lpips/mean-of-images"
    return Metric("lpips_style", protocol, function, higher_is_better=False)


def standard_metrics(lpips: nn.Module | None = None) -> tuple[Metric, ...]:
    """PSNR, SSIM in both protocols and, if a network is given, the LPIPS-style distance."""
    metrics = (psnr_metric(), ssim_metric("gaussian"), ssim_metric("uniform"))
    return metrics if lpips is None else (*metrics, lpips_metric(lpips))


def _rounding(rounding: bool) -> str:
    return "8-bit-rounded" if rounding else "float"


def _prepare(name: str, images: Tensor, reference: Tensor, rounding: bool) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape != reference.shape:
        raise ValueError(
            f"{name}: images and reference must be [B, C, H, W] of the same shape, got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    # float64: in float32, E[x^2] - E[x]^2 of a flat region cancels to noise that is not small next to C2 = 0.0009.
    x, y = images.double(), reference.double()
    return (round_to_8_bit(x), round_to_8_bit(y)) if rounding else (x, y)


def _blur(x: Tensor, window: str) -> Tensor:
    """Mean under the window, only where the window fits: [B, C, H, W] -> [B, C, H - size + 1, W - size + 1]."""
    size = WINDOWS[window]
    if window == "uniform":
        return F.avg_pool2d(x, size, stride=1)
    weights = [math.exp(-0.5 * ((i - size // 2) / GAUSSIAN_SIGMA) ** 2) for i in range(size)]
    # A sum of shifted views: ten times faster than conv2d in float64 on a CPU.
    for axis in (2, 3):
        length = x.shape[axis] - size + 1
        total = torch.zeros_like(x.narrow(axis, 0, length))
        for i, weight in enumerate(weights):
            total.add_(x.narrow(axis, i, length), alpha=weight / sum(weights))
        x = total
    return x
