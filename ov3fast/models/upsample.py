"""Nearest-neighbour upsampling folded into the 3 x 3 convolution that follows, for a VAE's decoder on a GPU.

Of the four pixels that one becomes, each sees two rows and two columns of the small image only: its convolution is one of 2 x 2 whose weights are sums of
the 3 x 3's. Four such convolutions take 4/9 of the multiplications, and the large image is written once and not read. Exact in exact
arithmetic; sums of 16-bit weights are rounded once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upsample_convolution(x: Tensor, phases: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(interpolate(x, 2, "nearest"), weight, bias, padding=1) from `phase_weights(weight)`: x [B, C, H, W] -> [B, D, 2H, 2W]."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    y = torch.empty(
        (x.shape[0], phases.shape[1], 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    for number, weight in enumerate(phases):
        row, column = divmod(number, 2)
        part = padded[:, :, row : row + height + 1, column : column + width + 1]
        y[:, :, row::2, column::2] = F.conv2d(part, weight, bias)
    return y


def phase_weights(weight: Tensor) -> Tensor:
    """[D, C, 3, 3] -> [4, D, C, 2, 2]: of the pixels (even, even), (even, odd), (odd, even), (odd, odd); summed in float32."""
    # An even row's three taps fall on the rows -1, 0, 0 of the small image, an odd row's on 0, 0, 1.
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    summed = torch.einsum("prh,qsw,dchw->pqdcrs", taps.to(wide.dtype), taps.to(wide.dtype), wide)
    return summed.flatten(0, 1).to(weight.dtype)


class UpsampleConvolution(nn.Module):
    """Upsampling and the convolution `conv` behind it: folded on a GPU, one after the other elsewhere. Its weights are frozen."""

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.conv: nn.Conv2d = upsample.conv
        self.unfolded = [upsample]  # a list: its parameters are this module's
        self.phases: Tensor | None = None

    def forward(self, x: Tensor, *more: object) -> Tensor:
        if not self.folds(x) or more:
            unfolded: Tensor = self.unfolded[0](x, *more)
            return unfolded
        weight = self.conv.weight
        if self.phases is None or (self.phases.dtype, self.phases.device) != (weight.dtype, weight.device):
            self.phases = phase_weights(weight.detach())
        return upsample_convolution(x, self.phases, self.conv.bias)

    @staticmethod
    def folds(x: Tensor) -> bool:
        """Not on a CPU, whose convolutions of 2 x 2 are slower than the product that they save."""
        return x.is_cuda and 4 * x.numel() < 2**31


def fold_upsampling(vae: nn.Module) -> None:
    """Replaces this package's Upsample and diffusers' Upsample2D within, where they are nearest upsampling by 2 and a 3 x 3 convolution."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if _folds(child):
                setattr(module, name, UpsampleConvolution(child))


def _folds(module: nn.Module) -> bool:
    if type(module).__name__ not in ("Upsample", "Upsample2D"):
        return False
    conv = getattr(module, "conv", None)
    plain = getattr(module, "norm", None) is None and not getattr(module, "use_conv_transpose", False)
    return (
        plain
        and getattr(module, "interpolate", True)
        and isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups) == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    )
