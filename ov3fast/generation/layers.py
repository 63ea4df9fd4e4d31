"""Layers of the generators: RMS norm, SwiGLU, attention with 2-D RoPE, adaLN blocks, time and position embeddings.

Legend: B batch, N tokens, D width, H heads, P = D / H, F frequencies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.models.transformer import Linear

EPS = 1e-6
THETA = 1e4
FREQUENCIES = 256


class RMSNorm(nn.Module):
    """RMS norm over the last axis, using ops.rms_norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x), or (norm(x + residual), x + residual)."""
        if residual is not None and residual.dtype != x.dtype:  # autocast: float32 residual stream, bfloat16 branches
            x = x + residual
            return ops.rms_norm(x, self.weight, EPS), x
        return ops.rms_norm(x, self.weight, EPS, residual=residual)


class SwiGLU(nn.Module):
    """w3(silu(a) * b), (a, b) = w12(x); hidden width 2/3 mlp_ratio width, so the cost matches that of a plain MLP."""

    def __init__(self, width: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(2 / 3 * mlp_ratio * width)
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(ops.swiglu(self.w12(x)))


def rotary_angles(height: int, width: int, head_dim: int, prefix: int = 0) -> Tensor:
    """RoPE angles [prefix + height * width, P / 2] of a row-major grid: the first half encodes the row, the second the column.
    Those of the `prefix` tokens before the grid are zero. ValueError unless P (head_dim) is a multiple of 4."""
    if head_dim % 4:
        raise ValueError(f"rotary positions in two dimensions need a head of a multiple of 4 channels, got {head_dim}")
    frequencies = THETA ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat([place.reshape(-1, 1) * frequencies for place in (rows, columns)], 1)
    return torch.cat([angles.new_zeros(prefix, head_dim // 2), angles])


def rotation(angles: Tensor) -> Tensor:
    """Angles [N, P / 2] -> cosines and sines [2, N, P / 2], as ops.rope takes them."""
    return torch.stack([angles.cos(), angles.sin()])


class RotaryAttention(nn.Module):
    """Self-attention with biases, RoPE and, with qk_norm, RMS norm on q and k."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else None
        self.k_norm = RMSNorm(width // heads) if qk_norm else None

    def forward(self, x_BND: Tensor, rotation: Tensor) -> Tensor:
        qkv = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
        weights = (norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None)
        return self.proj(ops.flash_attention_qkvpacked(ops.rope(qkv, *rotation, *weights, eps=EPS)).flatten(2))


class Block(nn.Module):
    """A pre-norm block; if `conditioned`, with adaLN-zero from a condition [B, 1 or N, D]:

    x = x + gate1 attention(norm1(x) (1 + scale1) + shift1);   x = x + gate2 swiglu(norm2(x) (1 + scale2) + shift2)
    """

    def __init__(self, width: int, heads: int, *, conditioned: bool, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = RotaryAttention(width, heads, qk_norm)
        self.mlp = SwiGLU(width)
        self.modulation = Linear(width, 6 * width) if conditioned else None

    def forward(self, x_BND: Tensor, rotation: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.modulation is None:
            normed, x_BND = self.norm2(self.attn(self.norm1(x_BND), rotation), x_BND)
            return x_BND + self.mlp(normed)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, -1)
        branch = gate1 * self.attn(self.norm1(x_BND) * (1 + scale1) + shift1, rotation)
        normed, x_BND = self.norm2(branch, x_BND)
        return x_BND + gate2 * self.mlp(normed * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """norm -> adaLN from a condition [B, 1 or N, D] (if conditioned) -> channels; zero at initialisation."""

    def __init__(self, width: int, channels: int, *, conditioned: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = Linear(width, 2 * width) if conditioned else None
        self.linear = Linear(width, channels)

    def forward(self, x_BND: Tensor, condition: Tensor | None = None) -> Tensor:
        x_BND = self.norm(x_BND)
        if self.modulation is not None:
            shift, scale = self.modulation(F.silu(condition)).chunk(2, -1)
            x_BND = x_BND * (1 + scale) + shift
        return self.linear(x_BND)


class TimeEmbedding(nn.Module):
    """t [B] -> [B, D]: fixed Gaussian Fourier features with F frequencies, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(FREQUENCIES))
        self.fc1, self.fc2 = Linear(2 * FREQUENCIES, width), Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * torch.pi * t.float()[:, None] * self.frequencies.float()
        features = torch.cat([angles.sin(), angles.cos()], -1)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


def sincos_positions(height: int, width: int, channels: int) -> Tensor:
    """Fixed position embeddings [N, D] of a grid: D / 4 sines and D / 4 cosines each for row and column."""
    frequencies = THETA ** (-torch.arange(channels // 4) / (channels // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = [wave(place.reshape(-1, 1) * frequencies) for place in (rows, columns) for wave in (torch.sin, torch.cos)]
    return torch.cat(parts, 1)
