"""The replacements that `optimize` makes in other libraries' modules: the same parameters under the same names, with another forward.

A module's class becomes a base of its new class, so `isinstance` and everything but `forward` still work; calls that need what the operators
lack (a mask, dropout in training, a cache) go to the base's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.inference.blocks import Block, describe
from ov3fast.inference.int8 import QuantizedConvolution, Range, group_norm_silu_quantized, has_kernels, quantize_activation
from ov3fast.inference.packed import Kept, PackedConvolution, packs
from ov3fast.inference.products import Products, Ranges, observed, packed, plain, quantized, run, stacked
from ov3fast.models.group_norm_silu import GroupNormSiLU, fuse_group_norm_silu
from ov3fast.models.transformer import Block as OwnBlock

HARMLESS = ("output_hidden_states", "return_dict", "use_cache")
"""Keyword arguments that transformers passes down to a block that ignores them."""
STATE = "_ov3fast"
"""Attribute in which a fused module keeps what it derived from its weights, outside nn.Module's bookkeeping."""


def units(model: nn.Module) -> dict[str, str]:
    """Path within the model -> what would be fused there; units are never nested."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        block = describe(module)
        if block is not None:
            found[path] = "layer norms with their sums, attention, MLP" if block.fc1 else "layer norms, attention"
        elif type(module).__name__ == "ResnetBlock2D" and getattr(module, "time_emb_proj", None) is None:
            if isinstance(module.norm1, nn.GroupNorm) and isinstance(module.nonlinearity, nn.SiLU):
                found[path] = "GroupNorm + SiLU"
        elif _is_layer_norm(module):
            found[path] = "layer norm"
    return found


def _is_layer_norm(module: nn.Module) -> bool:
    # Checked by name too: timm's LayerNorm2d is an nn.LayerNorm that normalises another axis.
    if not isinstance(module, nn.LayerNorm) or type(module).__name__ != "LayerNorm":
        return False
    return len(module.normalized_shape) == 1 and module.weight is not None


def fuse(module: Any) -> None:
    """Fuses one unit, in place."""
    if describe(module) is not None:
        _take_forward(module, _own_block_forward if isinstance(module, OwnBlock) else _block_forward)
        module.__dict__[STATE] = _BlockState()
    elif type(module).__name__ == "ResnetBlock2D":
        fuse_group_norm_silu(module)
    else:
        _take_forward(module, _layer_norm_forward)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Path -> the convolutions of an autoencoder that can be packed."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros" and module.padding != "same"
    }


def fuse_convolution(conv: Any) -> None:
    """Channels-last, by a packed product; in place."""
    _take_forward(conv, _convolution_forward)
    conv.__dict__[STATE] = _ConvolutionState()


def _take_forward(module: nn.Module, make: Callable[[type], Callable[..., Any]]) -> None:
    base = type(module)
    if base.__name__.startswith("Fused"):
        base = base.__bases__[0]
    module.__class__ = type(f"Fused{base.__name__}", (base,), {"forward": make(base), "__module__": base.__module__})


def _layer_norm_forward(base: Any) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    return forward


# Blocks


class _BlockState:
    """stacked, products: cached between calls. ranges: from calibration, if the block is to run in int8."""

    def __init__(self, ranges: Ranges | None = None) -> None:
        self.stacked, self.products = Kept(), Kept()
        self.ranges, self.observing = ranges, ranges is not None

    def __deepcopy__(self, memo: Any) -> _BlockState:
        made = type(self)(self.ranges)
        made.observing = self.observing
        return made


def calibrate(module: Any) -> None:
    """Makes the fused block or convolution record its inputs' ranges, until `calibrated`."""
    module.__dict__[STATE] = _ConvolutionState(Range()) if isinstance(module, nn.Conv2d) else _BlockState(Ranges())


def calibrated(module: Any) -> bool:
    """Switches it to int8 and returns True, unless it saw no input."""
    state = module.__dict__[STATE]
    state.observing = False
    seen: bool = state.ranges.seen if isinstance(module, nn.Conv2d) else state.ranges.qkv.seen
    if not seen:
        state.ranges = None
    return seen


def leave_wide(module: Any) -> None:
    """Returns a calibrated module to the wide dtype."""
    module.__dict__[STATE].ranges = None


def _products(module: Any, block: Block, x: Tensor) -> Products:
    state: _BlockState = module.__dict__[STATE]
    tensors = block.tensors()
    if state.ranges is not None:
        ranges = state.ranges
        if state.observing:
            return observed(block, ranges)
        _refuse_gradient(x)
        return state.products.get(tensors, lambda: quantized(block, ranges, x.dtype))
    if packs(x, tensors):
        return state.products.get(tensors, lambda: packed(block, x.shape[:-1].numel()))

    def stack() -> tuple[Tensor, Tensor | None]:
        fixed = not (torch.is_grad_enabled() and block.qkv[0][0].requires_grad) and not torch.compiler.is_compiling()
        return state.stacked.get(tensors, lambda: stacked(block)) if fixed else stacked(block)

    return plain(block, stack)


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("an int8 model has no gradients: its input must not require grad")


def _block_forward(base: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked = [*args, *(value for name, value in kwargs.items() if name not in HARMLESS)]
        if self.training or any(value is not None and value is not False for value in asked):
            return base.forward(self, hidden_states, *args, **kwargs)
        block = describe(self)
        assert block is not None
        x, branch = run(block, _products(self, block, hidden_states), hidden_states)
        return x + branch

    return forward


def _own_block_forward(base: Any) -> Callable[..., Any]:
    def forward(
        self: Any, x_BND: Tensor, branch_BND: Tensor | None, causal: bool = False, prefix_len: int = 0, cache: Any = None
    ) -> Any:
        if self.training or causal or cache is not None:
            return base.forward(self, x_BND, branch_BND, causal, prefix_len, cache)
        block = describe(self)
        assert block is not None
        return run(block, _products(self, block, x_BND), x_BND, branch_BND)

    return forward


# Convolutions


class _ConvolutionState:
    def __init__(self, ranges: Range | None = None) -> None:
        self.products = Kept()
        self.ranges, self.observing = ranges, ranges is not None

    def __deepcopy__(self, memo: Any) -> _ConvolutionState:
        made = type(self)(self.ranges)
        made.observing = self.observing
        return made


def _convolution_forward(base: Any) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        state: _ConvolutionState = self.__dict__[STATE]
        tensors = [self.weight, self.bias]
        if state.ranges is not None:
            ranges = state.ranges
            if state.observing:
                ranges.see(x, axis=1)
                return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
            _refuse_gradient(x)
            made = state.products.get(
                tensors, lambda: QuantizedConvolution(self, ranges.scale_and_zero(), list(x.shape), self.weight.dtype)
            )
            return made(x)
        if not packs(x, tensors):
            plain: Tensor = base.forward(self, x)
            return plain
        return state.products.get(tensors, lambda: PackedConvolution(self, list(x.shape)))(x)

    return forward


# Norms that write an int8 convolution's input


def norms_before(model: nn.Module) -> dict[str, str]:
    """Path of a convolution -> path of the GroupNormSiLU whose result goes there and nowhere else."""
    found = {}
    for path, module in model.named_modules():
        for norm, conv in (("norm1", "conv1"), ("norm2", "conv2")):
            if isinstance(getattr(module, norm, None), GroupNormSiLU) and isinstance(getattr(module, conv, None), nn.Conv2d):
                found[f"{path}.{conv}".lstrip(".")] = f"{path}.{norm}".lstrip(".")
    return found


def quantize_norm(norm: Any, conv: Any) -> None:
    """Makes the norm before an int8 convolution write uint8; in place."""
    _take_forward(norm, _quantized_norm_forward)
    norm.__dict__[STATE] = conv.__dict__[STATE].ranges.scale_and_zero()


def quantized_input(conv: Any, x: Tensor) -> Tensor:
    """x as a norm before the calibrated convolution would write it."""
    return quantize_activation(x.contiguous(memory_format=torch.channels_last), *conv.__dict__[STATE].ranges.scale_and_zero())


def _quantized_norm_forward(base: Any) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last) or not has_kernels(x):
            made: Tensor = base.forward(self, x)
            return made
        _refuse_gradient(x)
        return group_norm_silu_quantized(x, self.num_groups, self.weight, self.bias, self.eps, self.__dict__[STATE])

    return forward
