"""The towers' operators as one would write them in plain PyTorch: what torch.compile is given as a peer of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.models.openvision3 import PARTS, OpenVision3


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    normed = F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(x.dtype)
    return normed if residual is None else (normed, total)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str) -> Tensor:
    hidden = F.gelu(F.linear(x, w1, b1), approximate="tanh" if "tanh" in activation else "none")
    return F.linear(hidden, w2, b2)


def attention(qkv: Tensor, *, causal: bool = False, prefix_len: int = 0) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mask = None
    if causal and prefix_len:
        n = q.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        mask[:, :prefix_len] = True
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
    return out.transpose(1, 2)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@contextmanager
def in_plain_pytorch() -> Iterator[None]:
    """Within, the transformers' blocks are PyTorch's functions, with which torch.compile can do as it likes, and all else runs on them too."""
    functions = {
        "layer_norm": layer_norm, "linear": linear, "mlp": mlp, "flash_attention_qkvpacked": attention, "group_norm_silu": group_norm_silu,
    }  # fmt: skip
    with mock.patch.multiple(ops, **functions), ops.use("eager"):
        yield


@contextmanager
def compiled(model: OpenVision3, vae: nn.Module, kept: dict[str, Any]) -> Iterator[None]:
    """Within, the towers' blocks and the VAE's encoder and decoder are torch.compile's, compiled at their first use and kept in `kept`."""
    transformers = {name: getattr(model, name).transformer for name in PARTS}
    modules = {**transformers, "vae encoder": vae.encoder, "vae decoder": vae.decoder}
    with in_plain_pytorch():
        for name, module in modules.items():
            if name not in kept:
                kept[name] = torch.compile(module.forward, dynamic=False)
            module.forward = kept[name]
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward
