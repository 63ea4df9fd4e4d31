"""Where the values of a patch lie: value k = (c, dy, dx) of patch m = (b, i, j) is place (b, c, i p + dy, j p + dx) of a picture."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def patch_offsets(m, k, tokens, grid_w, stride_b, stride_c, stride_h, PATCH: tl.constexpr):
    """int64 [M, K]; the picture's last axis is contiguous."""
    n = m % tokens
    corner = (m // tokens).to(tl.int64) * stride_b + (n // grid_w * PATCH).to(tl.int64) * stride_h + n % grid_w * PATCH
    inside = (k // (PATCH * PATCH)).to(tl.int64) * stride_c + (k // PATCH % PATCH).to(tl.int64) * stride_h + k % PATCH
    return corner[:, None] + inside[None, :]
