"""Noise injection and projection: ov3fast/ops/noise_projection.py.

One elementwise kernel writes x = z + sigma_b eps in z's dtype, and cuBLAS multiplies it. Generating the noise dominates: some 50 integer and float
instructions per element. Fused into the product, each tile of features would regenerate its rows' noise, six times at 768 features: an estimated 150 us on
an H100, against 48 for one pass plus a cuBLAS product; x, 25 MB there, mostly stays in the L2 cache between the two. The backward regenerates the noise
once, both for x in the weight gradient and for the sums of dz eps.
z is [B, N, K] with any strides over B and N; a row m is (b, n).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import linear
from .lib import philox
from .lib.common import TYPES, cdiv, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel
from .lib.rows import rows as as_rows

# Size classes: none.
TABLE["noise_projection_draw"] = {(ANY, ANY, ANY): Config({"BLOCK_M": 8, "BLOCK_N": 256}, warps=4, stages=1)}
TABLE["noise_projection_grad_sigma"] = {(ANY, ANY, ANY): Config({"BLOCK": 256}, warps=4, stages=1)}


@triton.jit
def _row_offsets(m, stride_b, stride_n, tokens):
    return (m // tokens).to(tl.int64) * stride_b + (m % tokens).to(tl.int64) * stride_n


@triton.jit
def _noise(seed, offset, m, first, width, BLOCK_N: tl.constexpr, IN_ORDER: tl.constexpr):
    """eps[m, first : first + BLOCK_N] of the contiguous [M, width]."""
    if IN_ORDER:
        blocks = first // 4 + tl.arange(0, BLOCK_N // 4)
        return philox.normals_in_order(seed, (m.to(tl.int64) * (width // 4) + offset)[:, None] + blocks[None, :])
    else:
        return philox.normal_at(seed, offset, m.to(tl.int64)[:, None] * width + (first + tl.arange(0, BLOCK_N))[None, :])


@kernel
def noise_projection_draw(
    z, stride_b, stride_n, sigma, rng, x, grad_z, sigma_partials, tokens, rows, width, tiles,
    IN_ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x = z + sigma eps [rows, width], and sums of grad_z eps over each row's columns in the tile: sigma_partials [tiles, rows].

    Either is skipped if x or grad_z is None.
    """
    seed, offset = tl.load(rng), tl.load(rng + 1)
    program = tl.program_id(0)
    tile = program % tiles
    m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < rows)[:, None] & (k < width)[None, :]
    at = m.to(tl.int64)[:, None] * width + k[None, :]
    noise = _noise(seed, offset, m, tile * BLOCK_N, width, BLOCK_N, IN_ORDER)
    if x is not None:
        value = tl.load(z + _row_offsets(m, stride_b, stride_n, tokens)[:, None] + k[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        value += tl.load(sigma + m // tokens, mask=m < rows, other=0.0).to(tl.float32)[:, None] * noise
        tl.store(x + at, rounded(value, x.dtype.element_ty), mask=mask)
    if grad_z is not None:
        sums = tl.sum(tl.load(grad_z + at, mask=mask, other=0.0).to(tl.float32) * noise, 1)
        tl.store(sigma_partials + tile.to(tl.int64) * rows + m, sums, mask=m < rows)


@kernel
def noise_projection_grad_sigma(sigma_partials, grad_sigma, tokens, rows, tiles, BLOCK: tl.constexpr):
    """Sums sigma_partials [tiles, rows] over tiles and the rows of each instance."""
    b = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    sigma_partials += b * tokens
    for _ in range(tiles):
        for start in range(0, tokens, BLOCK):
            n = start + tl.arange(0, BLOCK)
            total += tl.load(sigma_partials + n, mask=n < tokens, other=0.0)
        sigma_partials += rows
    tl.store(grad_sigma + b, rounded(tl.sum(total, 0), grad_sigma.dtype.element_ty))


def _instances(x):
    """[B, ..., K] -> [B, N, K] whose last axis is contiguous."""
    x = x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def _draw(z_BNK, sigma, rng, need_x, grad_z):
    """x [B N, K] or None, and partial sums of grad_z eps per row [tiles, B N] or None."""
    batch, tokens, width = z_BNK.shape
    config = pick("noise_projection_draw", TYPES[z_BNK.dtype])
    rows, tiles = batch * tokens, cdiv(width, config.blocks["BLOCK_N"])
    x = torch.empty(rows, width, dtype=z_BNK.dtype, device=z_BNK.device) if need_x else None
    partials = None if grad_z is None else torch.empty(tiles, rows, dtype=torch.float32, device=z_BNK.device)
    noise_projection_draw[(cdiv(rows, config.blocks["BLOCK_M"]) * tiles,)](
        z_BNK, *z_BNK.stride()[:2], sigma.contiguous(), rng.contiguous(), x, grad_z, partials, tokens, rows, width, tiles,
        width % 4 == 0, **config.options,
    )  # fmt: skip
    return x, partials


def forward(z, sigma, weight, bias, rng):
    """y [B, ..., D]."""
    x, _ = _draw(_instances(z), sigma, rng, True, None)
    return linear.forward(x, weight, bias).view(*z.shape[:-1], len(weight))


def backward(grad_y, z, sigma, weight, rng, need_z, need_sigma, need_weight, need_bias):
    """Gradients of z, sigma, weight and bias; empty tensors for those not needed."""
    z_BNK, grad = _instances(z), as_rows(_instances(grad_y)).matrix
    grad_z = grad_sigma = none = grad_y.new_empty(0)
    x = z_BNK
    if need_sigma:  # which is of the noise times z's gradient, summed while x is drawn
        grad_z, *_ = linear.backward(grad, z_BNK, weight, True, False, False)
    if need_sigma or need_weight:
        drawn, partials = _draw(z_BNK, sigma, rng, need_weight, grad_z if need_sigma else None)
        x = drawn if need_weight else z_BNK
        if need_sigma:
            grad_sigma = _grad_sigma(partials, sigma, z_BNK.shape[1])
    found, grad_weight, grad_bias = linear.backward(grad, x, weight, need_z and not need_sigma, need_weight, need_bias)
    grad_z = grad_z if need_sigma else found
    return grad_z.view(z.shape) if need_z else none, grad_sigma, grad_weight, grad_bias


def _grad_sigma(partials, sigma, tokens):
    """[B] from the sums of grad_z eps per tile and row."""
    tiles, rows = partials.shape
    grad_sigma = torch.empty_like(sigma, memory_format=torch.contiguous_format)
    config = pick("noise_projection_grad_sigma", "fp32")
    noise_projection_grad_sigma[(len(sigma),)](partials, grad_sigma, tokens, rows, tiles, **config.options)
    return grad_sigma
