"""The one layout of patches: a picture [B, C, H, W] as rows [B, N, C p p], grid row-major, each row in the order (c, dy, dx).

It is the order in which nn.Conv2d's weight [D, C, p, p] flattens.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = {4: torch.int32, 8: torch.int64}


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


# The same for values alone, which no autograd follows: a patch's line of p elements moves as one word, in half the time.


def moved_to_patches(picture: Tensor, patch_size: int) -> Tensor:
    """`to_patches` of a contiguous picture."""
    word = WORDS.get(patch_size * picture.element_size())
    if word is None:
        return to_patches(picture, patch_size)
    b, c, height, width = picture.shape
    h, w = height // patch_size, width // patch_size
    lines = picture.view(word).view(b, c, h, patch_size, w).permute(0, 2, 4, 1, 3).contiguous()
    return lines.view(picture.dtype).view(b, h * w, c * patch_size**2)


def moved_from_patches(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """`from_patches` of contiguous patches."""
    word = WORDS.get(patch_size * patches.element_size())
    if word is None:
        return from_patches(patches, patch_size, grid)
    b, _, values = patches.shape
    (h, w), c = grid, values // patch_size**2
    lines = patches.view(word).view(b, h, w, c, patch_size).permute(0, 3, 1, 4, 2).contiguous()
    return lines.view(patches.dtype).view(b, c, h * patch_size, w * patch_size)
