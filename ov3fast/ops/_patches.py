"""The one layout of patches: a picture [B, C, H, W] as rows [B, N, C p p], grid row-major, each row in the order (c, dy, dx).

It is the order in which nn.Conv2d's weight [D, C, p, p] flattens.
"""

from __future__ import annotations

from torch import Tensor


def to_patches(picture: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, (H/p)(W/p), C p p], contiguous."""
    b, c, height, width = picture.shape
    h, w = height // patch_size, width // patch_size
    split = picture.reshape(b, c, h, patch_size, w, patch_size)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * patch_size**2).contiguous()


def from_patches(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """[B, h w, C p p] -> [B, C, h p, w p], contiguous."""
    b, _, values = patches.shape
    (h, w), c = grid, values // patch_size**2
    split = patches.reshape(b, h, w, c, patch_size, patch_size)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h * patch_size, w * patch_size).contiguous()
