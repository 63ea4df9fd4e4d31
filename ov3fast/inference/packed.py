"""Frozen layers on CPUs with weights packed once: oneDNN's linear layers and convolutions, fused with a following GELU.

By default oneDNN reorders the weights in every call. Here that happens when a layer first runs, and again after a weight has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

GELU = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""ops.mlp's activations -> oneDNN's names for them."""
SWISH = ("swish", "")
"""x sigmoid(x)."""
QUICK = 1.702
"""s of the quick GELU x sigmoid(s x)."""
NOTHING = ("none", "")

Made = TypeVar("Made")


def packs(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether products of x with the weights in `tensors` can be packed: on a CPU, in a single dtype that oneDNN supports there, without gradients."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or torch.compiler.is_compiling():
        return False
    if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        return False
    return all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in tensors) and x.numel() > 0


class Kept:
    """A value derived from a module's weights, cached until one of them changes. A copy of the module makes its own."""

    def __init__(self) -> None:
        self.state: Any = None
        self.value: Any = None

    def get(self, tensors: Sequence[Tensor | None], make: Callable[[], Made]) -> Made:
        now = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors if t is not None]
        if self.state != now:
            with torch.no_grad():
                self.value = make()
            self.state = now
        made: Made = self.value
        return made

    def __deepcopy__(self, memo: Any) -> Kept:
        return type(self)()

    def __reduce__(self) -> Any:
        return (type(self), ())


class PackedLinear:
    """activation(x weight^T + bias)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, activation: tuple[str, str] = NOTHING) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = None if bias is None else bias.detach()
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        name, algorithm = self.activation
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y


class PackedConvolution:
    """conv2d, channels-last."""

    def __init__(self, conv: nn.Conv2d, shape: list[int]) -> None:
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach().contiguous(), *self.geometry, shape)
        self.bias = None if conv.bias is None else conv.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")
        return y
