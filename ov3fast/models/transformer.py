"""The pre-LN transformer that all four towers share, and its initialisation.

    x = x + attention(norm1(x));   x = x + mlp(norm2(x))

The sum that a norm needs is fused into that norm: a block takes and returns (x, branch), where `branch` is the last branch's
output, still to be added to x. Under autocast the residual stream is in the autocast dtype (the official recipe: float32
parameters, bfloat16 activations).

Legend: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ov3fast import ops

EPS = 1e-6
RECOMPUTE = ("block", "mlp")
"""What activation checkpointing may recompute."""


class LayerNorm(nn.Module):
    """Layer norm over the last axis through ops.layer_norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x), or (norm(x + residual), x + residual)."""
        return ops.layer_norm(x, self.weight, self.bias, EPS, residual=residual)


class Linear(nn.Linear):
    """A linear layer through ops.linear."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class KeyValueCache:
    """Keys and values of the tokens seen so far, one pair per block; for generation only."""

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, block: int, k_BNHD: Tensor, v_BNHD: Tensor) -> tuple[Tensor, Tensor]:
        if block in self.pairs:
            k, v = self.pairs[block]
            k_BNHD, v_BNHD = torch.cat([k, k_BNHD], 1), torch.cat([v, v_BNHD], 1)
        self.pairs[block] = (k_BNHD, v_BNHD)
        return k_BNHD, v_BNHD

    def select(self, rows: Tensor) -> None:
        """Reorders (or repeats) the batch, as a beam search does between steps."""
        self.pairs = {block: (k[rows], v[rows]) for block, (k, v) in self.pairs.items()}


class Attention(nn.Module):
    """Multi-head self-attention with qkv bias; q, k and v are stacked in one projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BND: Tensor, causal: bool, prefix_len: int, cache: KeyValueCache | None, block: int) -> Tensor:
        batch, length, width = x_BND.shape
        qkv = self.qkv(x_BND).view(batch, length, 3, self.heads, width // self.heads)
        if cache is None:
            out = ops.flash_attention_qkvpacked(qkv, causal=causal, prefix_len=prefix_len)
        else:
            q, k, v = qkv.unbind(2)
            k, v = cache.append(block, k, v)
            # A lone newest token sees everything, so only the first call, with many queries, needs a mask.
            masked = causal and length > 1
            out = ops.flash_attention(q, k, v, causal=masked, prefix_len=prefix_len if masked else 0)
        projected: Tensor = self.proj(out.reshape(batch, length, width))
        return projected


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) through ops.mlp; exact GELU or its tanh form."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, activation=self.activation)


class Block(nn.Module):
    """One pre-LN block on (x, branch): see the file's head."""

    def __init__(self, width: int, heads: int, mlp_dim: int, activation: str, index: int) -> None:
        super().__init__()
        self.index = index
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, mlp_dim, activation)
        self.recompute_mlp = False

    def forward(
        self,
        x_BND: Tensor,
        branch_BND: Tensor | None,
        causal: bool = False,
        prefix_len: int = 0,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        normed, x_BND = (self.norm1(x_BND), x_BND) if branch_BND is None else self.norm1(branch_BND, residual=x_BND)
        branch_BND = self.attn(normed, causal, prefix_len, cache, self.index)
        if self.recompute_mlp and torch.is_grad_enabled():
            found: tuple[Tensor, Tensor] = recomputed(self._second_half, x_BND, branch_BND)
            return found
        return self._second_half(x_BND, branch_BND)

    def _second_half(self, x_BND: Tensor, branch_BND: Tensor) -> tuple[Tensor, Tensor]:
        normed, x_BND = self.norm2(branch_BND, residual=x_BND)
        return x_BND, self.mlp(normed)


class Transformer(nn.Module):
    """A stack of blocks: x [B, N, D] -> (x, branch), whose sum is the output, or `forward(..., norm)` -> norm of it."""

    def __init__(self, width: int, depth: int, heads: int, mlp_dim: int, activation: str = "gelu") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_dim, activation, index) for index in range(depth))
        self.activation_checkpointing = False

    def set_activation_checkpointing(self, enabled: bool, recompute: str = "block") -> None:
        """Recompute in the backward pass in place of keeping activations: "block" every block, "mlp" (selective) its second norm and MLP alone,
        whose hidden layer is the widest thing that a block keeps. ValueError for another word."""
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        self.activation_checkpointing = enabled and recompute == "block"
        for block in _blocks(self):
            block.recompute_mlp = enabled and recompute == "mlp"

    def forward(
        self,
        x_BND: Tensor,
        norm: LayerNorm | None = None,
        *,
        causal: bool = False,
        prefix_len: int = 0,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The residual stream after the last block [B, N, D], normed where `norm` is given.

        causal and prefix_len mean what they mean in ops.flash_attention. With `cache`, x holds only the tokens that the cache
        has not seen.
        """
        x, branch = activation_dtype(x_BND), None
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            if recompute:
                x, branch = recomputed(block, x, branch, causal, prefix_len)
            else:
                x, branch = block(x, branch, causal, prefix_len, cache)
        if norm is None:
            return x if branch is None else x + branch
        normed: Tensor = norm(x) if branch is None else norm(branch, residual=x)[0]
        return normed


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which the backward pass keeps the arguments alone."""
    # Nothing in a block is random, and a captured step can't read the state of the GPU's generator.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def activation_dtype(x: Tensor) -> Tensor:
    """Casts to the autocast dtype where autocast is on (float64 stays), so that the residual stream has one dtype."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def init_xavier(transformer: Transformer, residual_init: float) -> None:
    """The vision towers' initialisation (official src/models/vit.py): Xavier-uniform matrices, zero biases.

    q, k and v are three square matrices there, so each third of the stacked one is drawn on its own.
    """
    for block in _blocks(transformer):
        for third in block.attn.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(third)
        for linear in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
        _finish(block, residual_init)


def init_normal(transformer: Transformer, residual_init: float) -> None:
    """The text towers' initialisation (official src/models/text_transformer.py): normal, std by width and depth, zero biases."""
    depth = max(1, len(transformer.blocks))
    for block in _blocks(transformer):
        width = block.attn.proj.in_features
        nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attn.proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        _finish(block, residual_init)


def init_lecun(linear: nn.Linear) -> None:
    """Truncated normal of variance 1 / fan_in (Flax's lecun_normal, its default for a convolution), zero bias."""
    # 0.8796 is the std of a unit normal cut at two sigma.
    std = linear.in_features**-0.5 / 0.87962566103423978
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _blocks(transformer: Transformer) -> list[Block]:
    return [block for block in transformer.blocks if isinstance(block, Block)]


def _finish(block: Block, residual_init: float) -> None:
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        nn.init.zeros_(linear.bias)
    with torch.no_grad():
        block.attn.proj.weight.mul_(residual_init)
        block.mlp.fc2.weight.mul_(residual_init)
