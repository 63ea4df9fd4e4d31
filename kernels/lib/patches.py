"""The layout of patches: value k = (c, dy, dx) of patch m = (b, i, j) is element (b, c, i p + dy, j p + dx) of the image."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cdiv

PROGRAMS = 512
"""Target number of programs: if looping over all features per tile of patches would launch fewer, several programs share the features of a tile."""


@triton.jit
def patch_offsets(m, k, tokens, grid_w, stride_b, stride_c, stride_h, PATCH: tl.constexpr):
    """int64 [M, K]; the image's last axis is contiguous."""
    n = m % tokens
    corner = (m // tokens).to(tl.int64) * stride_b + (n // grid_w * PATCH).to(tl.int64) * stride_h + n % grid_w * PATCH
    inside = (k // (PATCH * PATCH)).to(tl.int64) * stride_c + (k // PATCH % PATCH).to(tl.int64) * stride_h + k % PATCH
    return corner[:, None] + inside[None, :]


def shares_of(features, patch_tiles, block, programs=PROGRAMS) -> tuple[int, int]:
    """(number of programs that share the features of one tile of patches, feature tiles per program)."""
    tiles = cdiv(features, block)
    share_tiles = cdiv(tiles, min(tiles, cdiv(programs, patch_tiles)))
    return cdiv(tiles, share_tiles), share_tiles
