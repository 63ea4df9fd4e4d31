"""Third-party GPU libraries for the operator table, if installed; none on a CPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(dtype: str) -> dict[str, Callable[..., Tensor]]:
    """name -> function of q, k, v [B,N,H,D]."""
    found = {}
    if dtype != "fp32" and torch.get_default_device().type == "cuda":
        backends = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
        found |= {name: functools.partial(_sdpa, backend) for name, backend in backends.items()}
    if frontend := _module("cudnn.sdpa.fwd.torch_op") if dtype != "fp32" else None:
        found["cudnn frontend"] = lambda q, k, v: frontend.sdpa(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    if flash := _module("flash_attn") if dtype != "fp32" else None:
        found["flash_attn"] = flash.flash_attn_func
    if hopper := _module("flash_attn_interface") if dtype != "fp32" else None:
        found["flash_attn 3"] = lambda q, k, v: _first(hopper.flash_attn_func(q, k, v))
    if blackwell := _module("flash_attn.cute") if dtype != "fp32" else None:
        found["flash_attn 4"] = lambda q, k, v: _first(blackwell.flash_attn_func(q, k, v))
    if xformers := _module("xformers.ops"):
        found["xformers"] = xformers.memory_efficient_attention
    return found


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def sigmoid_loss() -> dict[str, Callable[..., Tensor]]:
    """name -> function of image and text [N,D], logit scale and bias."""
    found = {}
    if siglip := _module("siglip_kernel"):
        found["siglip-kernel"] = lambda image, text, scale, bias: siglip.fused_siglip_loss(
            F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale.log(), bias
        )
    return found


def linear_cross_entropy() -> dict[str, Callable[..., Tensor]]:
    """name -> function of hidden, weight, labels."""
    found = {}
    if liger := _module("liger_kernel.transformers.functional"):
        found["Liger"] = lambda hidden, weight, labels: _first(liger.liger_fused_linear_cross_entropy(hidden, weight, labels))
    if cce := _module("cut_cross_entropy"):
        found["CCE"] = lambda hidden, weight, labels: cce.linear_cross_entropy(hidden, weight, labels)
    if quack := _module("quack.linear_cross_entropy"):
        found["quack"] = lambda hidden, weight, labels: _first(quack.chunked_linear_cross_entropy(hidden, weight, labels))
    return found


def layer_norm_after_addition(width: int) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """name -> function of x, weight, bias, residual that returns (normalised sum, sum)."""
    found = {}
    if apex := _module("apex.normalization.fused_layer_norm"):

        def fused(x, weight, bias, residual):
            h = x + residual
            return apex.fused_layer_norm_affine(h, weight, bias, (width,), 1e-6), h

        found["apex"] = fused
    if liger := _module("liger_kernel.transformers.functional"):

        def triton(x, weight, bias, residual):
            h = x + residual
            return liger.liger_layer_norm(h, weight, bias, 1e-6), h

        found["Liger"] = triton
    return found


def _module(name: str):
    if torch.get_default_device().type != "cuda":
        return None
    try:
        return importlib.import_module(name)
    except Exception:  # a library built for another PyTorch may raise anything
        return None


def _first(value):
    return value[0] if isinstance(value, tuple) else value
