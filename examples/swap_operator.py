"""Swap one operator into a plain ViT: same weights, same result, no N x N scores saved for the backward.

    python examples/swap_operator.py

Needs only torch and ov3fast.ops. Only `attention` changes.
"""

import torch
from torch import nn

from ov3fast import ops


def plain_attention(q, k, v):
    """q, k, v [B, N, H, D]."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.proj(self.attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, attention, width=96, depth=2, heads=3, patch=8, size=64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, attention) for _ in range(depth)))

    def forward(self, images):
        return self.blocks(self.patches(images).flatten(2).mT + self.positions).mean(1)


def main() -> float:
    torch.manual_seed(0)
    plain, swapped = ViT(plain_attention), ViT(ops.flash_attention)
    swapped.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 64, 64)
    results = [model(images) for model in (plain, swapped)]
    for result in results:
        result.square().mean().backward()
    difference = max((a.grad - b.grad).abs().max() for a, b in zip(plain.parameters(), swapped.parameters(), strict=True))
    print(f"largest difference: output {(results[0] - results[1]).abs().max():.1e}, gradients {difference:.1e}")
    return float(difference)


if __name__ == "__main__":
    main()
