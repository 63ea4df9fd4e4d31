"""Noise injection and projection: ov3fast/ops/noise_projection.py.

The left operand x = z + sigma_b eps is formed in registers, rounded to z's dtype and multiplied at once: no noise is stored or read. The price: each tile
of features draws its rows' noise again, ceil(D / BLOCK_N) times in the forward and ceil(D / BLOCK_M) times in the weight's gradient, about 45 integer
and float instructions per element (a quarter of a block of four). Beside the product's D multiply-adds per element that matters for small D
only, where few tiles draw.
z is [B, N, K] with any strides over B and N; a row m is (b, n).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lib import philox
from .lib.common import TYPES, cdiv, dot, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.reduce import column_sums, splits_of, sum_splits
from .lib.rows import rows as as_rows

# Size classes: none. The noise of a row is drawn once per tile of features, hence the wide tiles.
for _name in ("noise_projection_forward", "noise_projection_grad_z", "noise_projection_grad_weight"):
    TABLE[_name] = {
        (ANY, ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=2),
        ("bf16", ANY, ANY): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3),
        ("fp16", ANY, ANY): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3),
    }
TABLE["noise_projection_grad_sigma"] = {(ANY, ANY, ANY): Config({"BLOCK": 256}, warps=4, stages=1)}


@triton.jit
def _row_offsets(m, stride_b, stride_n, tokens):
    return (m // tokens).to(tl.int64) * stride_b + (m % tokens).to(tl.int64) * stride_n


@triton.jit
def _noise(seed, offset, m, first, width, BLOCK_K: tl.constexpr, IN_ORDER: tl.constexpr):
    """eps[m, first : first + BLOCK_K] of the contiguous [M, width]."""
    if IN_ORDER:
        blocks = first // 4 + tl.arange(0, BLOCK_K // 4)
        return philox.normals_in_order(seed, (m.to(tl.int64) * (width // 4) + offset)[:, None] + blocks[None, :])
    else:
        return philox.normal_at(seed, offset, m.to(tl.int64)[:, None] * width + (first + tl.arange(0, BLOCK_K))[None, :])


@triton.jit
def _noisy(
    z, stride_b, stride_n, sigma, seed, offset, m, first, tokens, rows, width, BLOCK_K: tl.constexpr, IN_ORDER: tl.constexpr
):
    """x[m, first : first + BLOCK_K] in z's dtype, 0 outside."""
    k = first + tl.arange(0, BLOCK_K)
    mask = (m < rows)[:, None] & (k < width)[None, :]
    value = tl.load(z + _row_offsets(m, stride_b, stride_n, tokens)[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    deviation = tl.load(sigma + m // tokens, mask=m < rows, other=0.0).to(tl.float32)
    value += deviation[:, None] * _noise(seed, offset, m, first, width, BLOCK_K, IN_ORDER)
    return rounded(tl.where(mask, value, 0.0), z.dtype.element_ty)


@triton.jit
def noise_projection_forward(
    z, stride_b, stride_n, sigma, weight, weight_stride, bias, rng, y, tokens, rows, width, features, tiles,
    IN_ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    seed, offset = tl.load(rng), tl.load(rng + 1)
    # Tiles of one strip of rows are neighbours in the grid, so that z is read from cache; the weight stays there.
    program = tl.program_id(0)
    m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    weight += d.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = tl.load(weight + k[None, :], mask=(d < features)[:, None] & (k < width)[None, :], other=0.0)
        x = _noisy(z, stride_b, stride_n, sigma, seed, offset, m, first, tokens, rows, width, BLOCK_K, IN_ORDER)
        total = dot(x, tl.trans(w), total)
    if bias is not None:
        total += tl.load(bias + d, mask=d < features, other=0.0).to(tl.float32)[None, :]
    mask = (m < rows)[:, None] & (d < features)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * features + d[None, :], rounded(total, y.dtype.element_ty), mask=mask)


@triton.jit
def noise_projection_grad_z(
    grad_y, stride_b, stride_n, weight, weight_stride, rng, grad_z, sigma_partials, tokens, rows, width, features, tiles,
    NEED_Z: tl.constexpr, NEED_SIGMA: tl.constexpr, IN_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz = dy W, and sums of dz eps over the tile's columns of each row: sigma_partials [tiles, rows]. Noise is drawn once per element."""
    program = tl.program_id(0)
    m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = program % tiles
    k = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_y += _row_offsets(m, stride_b, stride_n, tokens)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, features, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        upstream = tl.load(grad_y + d[None, :], mask=(m < rows)[:, None] & (d < features)[None, :], other=0.0)
        w = tl.load(
            weight + d.to(tl.int64)[:, None] * weight_stride + k[None, :],
            mask=(d < features)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        total = dot(upstream, w, total)
    mask = (m < rows)[:, None] & (k < width)[None, :]
    if NEED_Z:
        offsets = m.to(tl.int64)[:, None] * width + k[None, :]
        tl.store(grad_z + offsets, rounded(total, grad_y.dtype.element_ty), mask=mask)
    if NEED_SIGMA:
        seed, offset = tl.load(rng), tl.load(rng + 1)
        noise = _noise(seed, offset, m, tile * BLOCK_N, width, BLOCK_N, IN_ORDER)
        sums = tl.sum(tl.where(mask, total * noise, 0.0), 1)
        tl.store(sigma_partials + tile.to(tl.int64) * rows + m, sums, mask=m < rows)


@triton.jit
def noise_projection_grad_sigma(sigma_partials, grad_sigma, tokens, rows, tiles, BLOCK: tl.constexpr):
    """Adds up sigma_partials [tiles, rows] over tiles and the rows of each instance."""
    b = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    sigma_partials += b * tokens
    for _ in range(tiles):
        for start in range(0, tokens, BLOCK):
            n = start + tl.arange(0, BLOCK)
            total += tl.load(sigma_partials + n, mask=n < tokens, other=0.0)
        sigma_partials += rows
    tl.store(grad_sigma + b, rounded(tl.sum(total, 0), grad_sigma.dtype.element_ty))


@triton.jit
def noise_projection_grad_weight(
    grad_y, grad_stride_b, grad_stride_n, z, stride_b, stride_n, sigma, rng, partials,
    tokens, rows, width, features, split_rows, tiles_d, tiles_k,
    IN_ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial products dy^T x of a split of the rows: partials [splits, D, K]. Here BLOCK_M is of features, BLOCK_K of rows."""
    seed, offset = tl.load(rng), tl.load(rng + 1)
    program = tl.program_id(0)
    split = program // (tiles_d * tiles_k)
    d = program // tiles_k % tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
    first = program % tiles_k * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, rows), BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        at = grad_y + _row_offsets(m, grad_stride_b, grad_stride_n, tokens)[:, None] + d[None, :]
        upstream = tl.load(at, mask=(m < rows)[:, None] & (d < features)[None, :], other=0.0)
        x = _noisy(z, stride_b, stride_n, sigma, seed, offset, m, first, tokens, rows, width, BLOCK_N, IN_ORDER)
        total = dot(tl.trans(upstream), x, total)
    k = first + tl.arange(0, BLOCK_N)
    at = partials + (split * features + d).to(tl.int64)[:, None] * width + k[None, :]
    tl.store(at, rounded(total, partials.dtype.element_ty), mask=(d < features)[:, None] & (k < width)[None, :])


def _instances(x):
    """[B, ..., K] -> [B, N, K] whose last axis is contiguous."""
    x = x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def _rows(weight):
    return weight if weight.stride(1) == 1 else weight.contiguous()


def forward(z, sigma, weight, bias, rng):
    """y [B, ..., D]."""
    z_BNK, weight, sigma = _instances(z), _rows(weight), sigma.contiguous()
    (batch, tokens, width), features = z_BNK.shape, weight.shape[0]
    y = torch.empty(*z.shape[:-1], features, dtype=z.dtype, device=z.device)
    config = pick("noise_projection_forward", TYPES[z.dtype])
    rows, tiles = batch * tokens, cdiv(features, config.blocks["BLOCK_N"])
    noise_projection_forward[(cdiv(rows, config.blocks["BLOCK_M"]) * tiles,)](
        z_BNK, *z_BNK.stride()[:2], sigma, weight, weight.stride(0), bias if bias is None else bias.contiguous(), rng.contiguous(), y,
        tokens, rows, width, features, tiles, width % 4 == 0, **config.options,
    )  # fmt: skip
    return y


def backward(grad_y, z, sigma, weight, rng, need_z, need_sigma, need_weight, need_bias):
    """Gradients of z, sigma, weight and bias; empty ones where they are not asked for."""
    z_BNK, grad_BND, weight = _instances(z), _instances(grad_y), _rows(weight)
    sigma, rng = sigma.contiguous(), rng.contiguous()
    (batch, tokens, width), features = z_BNK.shape, weight.shape[0]
    rows, in_order, dtype = batch * tokens, width % 4 == 0, TYPES[z.dtype]
    grad_z = grad_sigma = grad_weight = grad_bias = none = grad_y.new_empty(0)
    if need_z or need_sigma:
        config = pick("noise_projection_grad_z", dtype)
        tiles = cdiv(width, config.blocks["BLOCK_N"])
        if need_z:
            grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        partials = torch.empty(tiles, rows, dtype=torch.float32, device=z.device) if need_sigma else None
        noise_projection_grad_z[(cdiv(rows, config.blocks["BLOCK_M"]) * tiles,)](
            grad_BND, *grad_BND.stride()[:2], weight, weight.stride(0), rng, grad_z if need_z else None, partials,
            tokens, rows, width, features, tiles, need_z, need_sigma, in_order, **config.options,
        )  # fmt: skip
        if need_sigma:
            grad_sigma = torch.empty(batch, dtype=sigma.dtype, device=z.device)
            noise_projection_grad_sigma[(batch,)](
                partials, grad_sigma, tokens, rows, tiles, **pick("noise_projection_grad_sigma", "fp32").options
            )
    if need_weight:
        config = pick("noise_projection_grad_weight", dtype)
        tiles_d, tiles_k = cdiv(features, config.blocks["BLOCK_M"]), cdiv(width, config.blocks["BLOCK_N"])
        splits, split_rows = splits_of(rows, config.blocks["BLOCK_K"], tiles_d * tiles_k)
        grad_weight = torch.empty(features, width, dtype=z.dtype, device=z.device)
        partials = torch.empty(splits, features, width, dtype=torch.float32, device=z.device) if splits > 1 else grad_weight
        noise_projection_grad_weight[(splits * tiles_d * tiles_k,)](
            grad_BND, *grad_BND.stride()[:2], z_BNK, *z_BNK.stride()[:2], sigma, rng, partials,
            tokens, rows, width, features, split_rows, tiles_d, tiles_k, in_order, **config.options,
        )  # fmt: skip
        if splits > 1:
            sum_splits(partials, grad_weight)
    if need_bias:
        grad_bias = column_sums(as_rows(grad_BND), z.dtype)
    return grad_z if need_z else none, grad_sigma, grad_weight, grad_bias
