"""A block's layers in four implementations: by the operators (with gradients), packed, observed for calibration, and in int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ov3fast import ops
from ov3fast.inference.blocks import Block, Pair
from ov3fast.inference.int8 import QuantizedLinear, QuantizedNorm, Range, evened, quantize_activation
from ov3fast.inference.packed import GELU, QUICK, SWISH, PackedLinear
from ov3fast.models.transformer import EPS

Norm = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(x, residual) -> (the norm of x + residual, x + residual)."""
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Products:
    norm1: Norm
    qkv: Layer
    proj: Layer
    norm2: Norm
    mlp: Layer


@dataclass
class Ranges:
    """Calibrated input ranges of each product."""

    qkv: Range = field(default_factory=Range)
    proj: Range = field(default_factory=Range)
    fc1: Range = field(default_factory=Range)
    fc2: Range = field(default_factory=Range)


def run(block: Block, products: Products, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [B, N, D], and the branch that is still to be added to it -> the same after the block."""
    batch, length, _ = x.shape
    normed, x = products.norm1(x, None) if branch is None else products.norm1(branch, x)
    qkv = products.qkv(normed).view(batch, length, 3, block.heads, -1)
    out = ops.flash_attention_qkvpacked(qkv).reshape(batch, length, -1)
    normed, x = products.norm2(products.proj(out), x)
    return x, products.mlp(normed)


def plain(block: Block, packed_qkv: Callable[[], tuple[Tensor, Tensor | None]]) -> Products:
    """By the operators."""
    weight, bias = packed_qkv()
    return Products(
        _norm(block.norm1),
        lambda x: ops.linear(x, weight, bias),
        lambda x: _scaled(ops.linear(x, *block.proj), block.scale1),
        _norm(block.norm2),
        lambda x: _scaled(_mlp(block, x), block.scale2),
    )


def packed(block: Block, rows: int) -> Products:
    """By oneDNN with weights packed for about `rows` rows; a branch's scale is folded into its last weights, a quick GELU's into both of the MLP's."""
    proj = PackedLinear(*_scaled_pair(block.proj, block.scale1), rows)
    mlp: Layer
    if block.fc1 is None or block.fc2 is None:
        mlp = lambda x: _scaled(block.mlp(x), block.scale2)  # noqa: E731
    else:
        pair1, pair2, activation = _hidden(block, block.fc1, block.fc2)
        fc1, fc2 = PackedLinear(*pair1, rows, activation or ("none", "")), PackedLinear(*pair2, rows)
        act = (lambda x: x) if activation else block.act
        mlp = lambda x: fc2(act(fc1(x)))  # noqa: E731
    return Products(_wide_norm(block.norm1), PackedLinear(*stacked(block), rows), proj, _wide_norm(block.norm2), mlp)


def observed(block: Block, ranges: Ranges) -> Products:
    """By the operators, recording the ranges of their inputs."""
    weight, bias = stacked(block)

    def seen(range_: Range, x: Tensor) -> Tensor:
        range_.see(x)
        return x

    def mlp(x: Tensor) -> Tensor:
        if block.fc1 is None or block.fc2 is None:
            return _scaled(block.mlp(x), block.scale2)
        hidden = _activated(block, ops.linear(seen(ranges.fc1, x), *block.fc1))
        return _scaled(ops.linear(seen(ranges.fc2, hidden), *block.fc2), block.scale2)

    return Products(
        _norm(block.norm1),
        lambda x: ops.linear(seen(ranges.qkv, x), weight, bias),
        lambda x: _scaled(ops.linear(seen(ranges.proj, x), *block.proj), block.scale1),
        _norm(block.norm2),
        mlp,
    )


def quantized(block: Block, ranges: Ranges, dtype: torch.dtype) -> Products:
    """In int8, with the calibrated ranges; results in `dtype`."""
    norm1, qkv = _evened(block.norm1, stacked(block), ranges.qkv, dtype)
    proj = QuantizedLinear(*_scaled_pair(block.proj, block.scale1), ranges.proj.scale_and_zero(), dtype)
    if block.fc1 is None or block.fc2 is None:
        return Products(norm1, qkv, proj, _norm(block.norm2), lambda x: _scaled(block.mlp(x), block.scale2))
    pair1, pair2, activation = _hidden(block, block.fc1, block.fc2)
    norm2, fc1 = _evened(block.norm2, pair1, ranges.fc1, dtype)
    fc2 = QuantizedLinear(*pair2, ranges.fc2.scale_and_zero(1 / QUICK if activation == SWISH else 1.0), dtype)

    def mlp(x: Tensor) -> Tensor:
        if activation is None:
            return fc2(block.act(fc1(x)))
        return fc2.product(fc1.product(quantize_activation(x, *fc1.input), fc2.input, activation))

    return Products(norm1, qkv, proj, norm2, mlp)


def stacked(block: Block) -> tuple[Tensor, Tensor | None]:
    """q, k and v as one projection."""
    if len(block.qkv) == 1:
        return block.qkv[0]
    weights, biases = zip(*block.qkv, strict=True)
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    # In some towers only the keys have no bias.
    some = next(bias for bias in biases if bias is not None)
    return torch.cat(weights), torch.cat([torch.zeros_like(some) if bias is None else bias for bias in biases])


def _evened(module: Any, layer: Any, range_: Range, dtype: torch.dtype) -> tuple[Norm, QuantizedLinear]:
    weight, bias = layer
    ratio = evened(range_.largest(), weight)
    made = QuantizedLinear(weight.detach().float() * ratio, bias, range_.scale_and_zero(ratio), dtype)
    scale, shift, eps = _parameters(module)
    shift = None if shift is None else shift.detach().float() / ratio
    return QuantizedNorm(scale.detach().float() / ratio, shift, eps, made.input), made


def _parameters(module: Any) -> tuple[Tensor, Tensor | None, float]:
    return module.weight, module.bias, getattr(module, "eps", EPS)


def _norm(module: Any) -> Norm:
    return _layer_norm(*_parameters(module))


def _wide_norm(module: Any) -> Norm:
    """With parameters in float32, as the CPU kernel wants them: in another dtype they'd be converted in every call."""
    weight, bias, eps = _parameters(module)
    return _layer_norm(weight.detach().float(), None if bias is None else bias.detach().float(), eps)


def _layer_norm(weight: Tensor, bias: Tensor | None, eps: float) -> Norm:
    def norm(x: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            return ops.layer_norm(x, weight, bias, eps), x
        return ops.layer_norm(x, weight, bias, eps, residual=residual)

    return norm


def _hidden(block: Block, fc1: Pair, fc2: Pair) -> tuple[Pair, Pair, tuple[str, str] | None]:
    """The MLP's two layers, and oneDNN's activation after the first, or None if it lacks the block's."""
    fc2 = _scaled_pair(fc2, block.scale2)
    if block.activation != "quick_gelu":
        return fc1, fc2, GELU[block.activation] if block.activation else None
    (weight1, bias1), (weight2, bias2) = fc1, fc2
    # h sigmoid(s h) = swish(s h) / s
    return (weight1 * QUICK, None if bias1 is None else bias1 * QUICK), (weight2 / QUICK, bias2), SWISH


def _mlp(block: Block, x: Tensor) -> Tensor:
    if block.fc1 is None or block.fc2 is None:
        y: Tensor = block.mlp(x)
        return y
    if block.activation not in GELU:
        return ops.linear(block.act(ops.linear(x, *block.fc1)), *block.fc2)
    return ops.mlp(x, *block.fc1, *block.fc2, activation=block.activation)


def _activated(block: Block, x: Tensor) -> Tensor:
    if block.activation not in GELU:
        y: Tensor = block.act(x)
        return y
    return torch.nn.functional.gelu(x, approximate=GELU[block.activation][1])


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _scaled_pair(pair: Any, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight, bias = pair
    if scale is None:
        return weight, bias
    return weight * scale[:, None], None if bias is None else bias * scale
