"""oneDNN's matrix products as a backend: for processors on which PyTorch's `F.linear` calls another library in float32 (MKL), and for its fused GELU.

PyTorch ships oneDNN and calls it for bfloat16; `torch.ops.mkldnn._linear_pointwise` reaches it in float32 too, with the activation
fused where no backward needs the pre-activation. Apart from these products the functions are those of each operator's eager backend.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._patches import moved_from_patches, moved_to_patches
from .mlp import ACTIVATIONS
from .mlp import _backward_eager as _mlp_backward_by

DTYPES = (torch.float32, torch.bfloat16)


def unavailable_reason() -> str | None:
    """Why it can't run at all, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch was built without oneDNN"
    return None


def unsupported_reason(x: Tensor) -> str | None:
    """Why it can't take this call, or None."""
    if not x.is_cpu:
        return f"it does not run on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"it does not take {x.dtype}"
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """x [R, K] weight^T [K, N] + bias, or gelu of it by oneDNN's name of the formula. weight may be the transpose of what lies there."""
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        weight = weight.contiguous()
    kind = ("none", "") if gelu is None else ("gelu", gelu)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, kind[0], [], kind[1])
    return y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _narrow(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """The parameters as x's dtype has them."""
    return [None if p is None else p.to(x.dtype).contiguous() for p in parameters]


def _linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(_rows(x), *_narrow(x, weight, bias)).view(*x.shape[:-1], weight.shape[0])


def _linear_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    grad_y, none = _rows(grad_y), grad_y.new_empty(0)
    return (
        product(grad_y, weight.to(x.dtype).t()).view(x.shape) if need_x else none,
        (grad_y.t() @ _rows(x)).to(weight.dtype) if need_weight else none.to(weight.dtype),
        grad_y.sum(0, dtype=weight.dtype) if need_bias else none.to(weight.dtype),
    )


def _mlp_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    w1, b1, w2, b2 = _narrow(x, w1, b1, w2, b2)
    h = product(_rows(x), w1, b1)
    y = product(torch.nn.functional.gelu(h, approximate=ACTIVATIONS[activation]), w2, b2)
    return y.view(*x.shape[:-1], w2.shape[0]), h.view(*x.shape[:-1], w1.shape[0])


def _mlp_inference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, None]:
    w1, b1, w2, b2 = _narrow(x, w1, b1, w2, b2)
    y = product(product(_rows(x), w1, b1, ACTIVATIONS[activation]), w2, b2)
    return y.view(*x.shape[:-1], w2.shape[0]), None


_mlp_forward.inference = _mlp_inference  # type: ignore[attr-defined]  # writes no pre-activation


_mlp_backward = functools.partial(_mlp_backward_by, product=lambda a, w: product(a, w.t()))


def _latents_forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, grid_h: int, grid_w: int) -> Tensor:
    patches = product(_rows(tokens), *_narrow(tokens, weight, bias))
    return moved_from_patches(patches.view(*tokens.shape[:2], -1), patch_size, (grid_h, grid_w))


def _latents_backward(
    grad_x: Tensor, tokens: Tensor, weight: Tensor, patch_size: int, need_tokens: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    rows, none = moved_to_patches(grad_x.contiguous(), patch_size).view(-1, weight.shape[0]), grad_x.new_empty(0)
    return (
        product(rows, weight.t()).view(tokens.shape) if need_tokens else none,
        (_rows(tokens).t() @ rows).t().contiguous() if need_weight else none,  # the long side first is the faster product
        rows.sum(0) if need_bias else none,
    )


for _op, _functions, _operand in (
    ("linear", (_linear_forward, _linear_backward), "x"),
    ("mlp", (_mlp_forward, _mlp_backward), "x"),
    ("latent_projection", (_latents_forward, _latents_backward), "tokens"),
):
    _dispatch.register(
        _op, "onednn", *_functions, operands=(_operand,),
        unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason,
    )  # fmt: skip
