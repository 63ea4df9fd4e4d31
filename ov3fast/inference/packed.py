"""Products of frozen layers on CPUs with their weights laid out once: oneDNN's linear layers and convolutions, with GELU behind where there is one.

Called as they come, oneDNN's products lay out the weights anew in each call. Here that is done when a layer first runs, and again once a weight has changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

GELU = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""ops.mlp's activations -> oneDNN's words for them."""
NOTHING = ("none", "")


def packs(x: Tensor) -> bool:
    """Whether products of x's dtype and device can be packed."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def state(tensors: Iterable[Tensor | None]) -> list[tuple[int, int]]:
    """What changes when one of them does."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None]


class PackedLinear:
    """activation(x weight^T + bias)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, activation: tuple[str, str] = NOTHING) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = None if bias is None else bias.detach()
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        name, algorithm = self.activation
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)


class PackedConvolution:
    """conv2d, channels-last."""

    def __init__(self, conv: nn.Conv2d, shape: list[int]) -> None:
        geometry: Any = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        weight = conv.weight.detach().contiguous()
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, shape)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.geometry = geometry

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")
