"""Tokens to latents: ov3fast/ops/latent_projection.py.

The forward's epilogue scatters into the image; the backward gathers patches of the image's gradient as operands of the products: neither needs a
rearranging pass. A patch has few values, C p p; if they fit in one tile, grad_tokens gathers a patch once and loops over the features.
A row m is token (b, n).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lib.common import TYPES, cdiv, dot, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel
from .lib.patches import patch_offsets, shares_of
from .lib.reduce import merge, splits_of, strips_of, sum_splits

# Size classes: none. BLOCK_K of grad_tokens covers an entire patch of 64 values.
TABLE["latent_projection_forward"] = {(ANY, ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=3)}
TABLE["latent_projection_grad_tokens"] = {
    (ANY, ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, warps=4, stages=1),
    ("bf16", ANY, ANY): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
    ("fp16", ANY, ANY): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
}
TABLE["latent_projection_grad_weight"] = {
    (ANY, ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3)
}
TABLE["latent_projection_grad_bias"] = {(ANY, ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_K": 64}, warps=4, stages=1)}


@triton.jit
def _row_offsets(m, stride_b, stride_n, tokens):
    return (m // tokens).to(tl.int64) * stride_b + (m % tokens).to(tl.int64) * stride_n


@kernel(do_not_specialize=["tokens"])
def latent_projection_forward(
    token_rows, stride_b, stride_n, weight, weight_stride, bias, x, rows, tokens, grid_w, values, width, tiles,
    PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    m = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    token_rows += _row_offsets(m, stride_b, stride_n, tokens)[:, None]
    weight += k.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        t = tl.load(token_rows + d[None, :], mask=(m < rows)[:, None] & (d < width)[None, :], other=0.0)
        w = tl.load(weight + d[None, :], mask=(k < values)[:, None] & (d < width)[None, :], other=0.0)
        total = dot(t, tl.trans(w), total)
    if bias is not None:
        total += tl.load(bias + k, mask=k < values, other=0.0).to(tl.float32)[None, :]
    across = grid_w * PATCH
    area = tokens.to(tl.int64) * (PATCH * PATCH)
    at = x + patch_offsets(m, k, tokens, grid_w, values * tokens.to(tl.int64), area, across, PATCH)
    tl.store(at, rounded(total, x.dtype.element_ty), mask=(m < rows)[:, None] & (k < values)[None, :])


@triton.jit
def _gathered(
    grad_x, stride_b, stride_c, stride_h, m, k, rows, tokens, grid_w, values, PATCH: tl.constexpr
):  # fmt: skip
    mask = (m < rows)[:, None] & (k < values)[None, :]
    return tl.load(grad_x + patch_offsets(m, k, tokens, grid_w, stride_b, stride_c, stride_h, PATCH), mask=mask, other=0.0)


@kernel
def latent_projection_grad_tokens(
    grad_x, stride_b, stride_c, stride_h, weight, weight_stride, grad_tokens,
    rows, tokens, grid_w, values, width, shares, share_tiles,
    PATCH: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program multiplies its tile of patches by its share of the features; WHOLE: a patch fits in one tile."""
    program = tl.program_id(0)
    m = program // shares * BLOCK_M + tl.arange(0, BLOCK_M)
    share = program % shares
    if WHOLE:
        g = _gathered(
            grad_x, stride_b, stride_c, stride_h, m, tl.arange(0, BLOCK_K), rows, tokens, grid_w, values, PATCH
        )  # fmt: skip
    for tile in range(share * share_tiles, (share + 1) * share_tiles):
        d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if WHOLE:
            k = tl.arange(0, BLOCK_K)
            at = weight + k.to(tl.int64)[:, None] * weight_stride + d[None, :]
            w = tl.load(at, mask=(k < values)[:, None] & (d < width)[None, :], other=0.0)
            total = dot(g, w, total)
        else:
            for first in range(0, values, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                g = _gathered(grad_x, stride_b, stride_c, stride_h, m, k, rows, tokens, grid_w, values, PATCH)
                at = weight + k.to(tl.int64)[:, None] * weight_stride + d[None, :]
                w = tl.load(at, mask=(k < values)[:, None] & (d < width)[None, :], other=0.0)
                total = dot(g, w, total)
        at = grad_tokens + m.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(at, rounded(total, grad_tokens.dtype.element_ty), mask=(m < rows)[:, None] & (d < width)[None, :])


@kernel
def latent_projection_grad_weight(
    grad_x, stride_b, stride_c, stride_h, token_rows, token_stride_b, token_stride_n, partials,
    rows, tokens, grid_w, values, width, split_rows, tiles_k, tiles_d,
    PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Split-K partial products over the rows: partials [splits, C p p, D]. BLOCK_M counts values, BLOCK_K rows."""
    program = tl.program_id(0)
    split = program // (tiles_k * tiles_d)
    k = program // tiles_d % tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    d = program % tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, rows), BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        g = _gathered(grad_x, stride_b, stride_c, stride_h, m, k, rows, tokens, grid_w, values, PATCH)
        at = token_rows + _row_offsets(m, token_stride_b, token_stride_n, tokens)[:, None] + d[None, :]
        t = tl.load(at, mask=(m < rows)[:, None] & (d < width)[None, :], other=0.0)
        total = dot(tl.trans(g), t, total)
    at = partials + (split * values + k).to(tl.int64)[:, None] * width + d[None, :]
    tl.store(at, rounded(total, partials.dtype.element_ty), mask=(k < values)[:, None] & (d < width)[None, :])


@kernel
def latent_projection_grad_bias(
    grad_x, stride_b, stride_c, stride_h, partials, rows, tokens, grid_w, values, strip_rows, tiles,
    PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over a strip of patches: partials [strips, C p p]."""
    program = tl.program_id(0)
    strip = program // tiles
    k = program % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(strip * strip_rows, tl.minimum((strip + 1) * strip_rows, rows), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        total += _gathered(grad_x, stride_b, stride_c, stride_h, m, k, rows, tokens, grid_w, values, PATCH).to(tl.float32)
    tl.store(partials + strip.to(tl.int64) * values + k, tl.sum(total, 0), mask=k < values)


def _last_contiguous(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(tokens, weight, bias, patch_size, grid_h, grid_w):
    """x [B, C, h p, w p]."""
    tokens, weight = _last_contiguous(tokens), _last_contiguous(weight)
    (batch, count, width), values = tokens.shape, weight.shape[0]
    x = torch.empty(
        batch, values // patch_size**2, grid_h * patch_size, grid_w * patch_size, dtype=tokens.dtype, device=tokens.device
    )
    config = pick("latent_projection_forward", TYPES[tokens.dtype])
    rows, tiles = batch * count, cdiv(values, config.blocks["BLOCK_N"])
    latent_projection_forward[(cdiv(rows, config.blocks["BLOCK_M"]) * tiles,)](
        tokens, *tokens.stride()[:2], weight, weight.stride(0), None if bias is None else bias.contiguous(), x,
        rows, count, grid_w, values, width, tiles, patch_size, **config.options,
    )  # fmt: skip
    return x


def backward(grad_x, tokens, weight, patch_size, need_tokens, need_weight, need_bias):
    """Gradients of tokens, weight and bias; empty tensors for those not needed."""
    grad_x, tokens, weight = _last_contiguous(grad_x), _last_contiguous(tokens), _last_contiguous(weight)
    (batch, count, width), values = tokens.shape, weight.shape[0]
    rows, grid_w, dtype = batch * count, grad_x.shape[3] // patch_size, TYPES[tokens.dtype]
    image = grad_x, *grad_x.stride()[:3]
    grad_tokens = grad_weight = grad_bias = grad_x.new_empty(0)
    if need_tokens:
        grad_tokens = grad_x.new_empty(tokens.shape)
        config = pick("latent_projection_grad_tokens", dtype)
        patch_tiles = cdiv(rows, config.blocks["BLOCK_M"])
        shares, share_tiles = shares_of(width, patch_tiles, config.blocks["BLOCK_N"])
        latent_projection_grad_tokens[(patch_tiles * shares,)](
            *image, weight, weight.stride(0), grad_tokens, rows, count, grid_w, values, width, shares, share_tiles,
            patch_size, values <= config.blocks["BLOCK_K"], **config.options,
        )  # fmt: skip
    if need_weight:
        config = pick("latent_projection_grad_weight", dtype)
        tiles_k, tiles_d = cdiv(values, config.blocks["BLOCK_M"]), cdiv(width, config.blocks["BLOCK_N"])
        splits, split_rows = splits_of(rows, config.blocks["BLOCK_K"], tiles_k * tiles_d)
        grad_weight = grad_x.new_empty(weight.shape)
        partials = grad_weight if splits == 1 else grad_weight.new_empty((splits, *weight.shape), dtype=torch.float32)
        latent_projection_grad_weight[(splits * tiles_k * tiles_d,)](
            *image, tokens, *tokens.stride()[:2], partials, rows, count, grid_w, values, width, split_rows, tiles_k, tiles_d,
            patch_size, **config.options,
        )  # fmt: skip
        if splits > 1:
            sum_splits(partials, grad_weight)
    if need_bias:
        config = pick("latent_projection_grad_bias", dtype)
        strips, strip_rows = strips_of(rows, config.blocks["BLOCK_M"])
        tiles = cdiv(values, config.blocks["BLOCK_K"])
        partials = torch.empty(strips, values, dtype=torch.float32, device=grad_x.device)
        latent_projection_grad_bias[(strips * tiles,)](
            *image, partials, rows, count, grid_w, values, strip_rows, tiles, patch_size, **config.options
        )
        grad_bias = grad_x.new_empty(values)
        merge(partials[None], grad_bias)
    return grad_tokens, grad_weight, grad_bias
