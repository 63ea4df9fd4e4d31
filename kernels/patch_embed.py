"""Patch embedding: ov3fast/ops/patch_embed.py.

A tile of patches is gathered, sampled, scaled, rounded and multiplied in registers; bias, position embedding and CLS token are added in the
epilogue, so the forward only reads latents and writes tokens. A patch has few values, K = C p p (64 for 16 channels); if they fit in one
tile, a program forms it once and loops over the features, so each random number is generated once, provided there are enough tiles of
patches to fill the chip. For the weight gradient the patches are written (2 MB at 64 images of 32 x 32, which stay in the L2 cache) before they are
multiplied; fused into the product, each of six tiles of 128 features would regenerate them. cuBLAS would need a copy of the upstream gradient without
its CLS rows; multiplying those rows by zeros would turn an infinite gradient of the CLS token into NaN.
A row m of the products is patch (b, n); z is [B, C, H, W].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lib import philox
from .lib.common import TYPES, cdiv, dot, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel
from .lib.patches import patch_offsets, shares_of
from .lib.reduce import splits_of, sum_batches, sum_splits
from .lib.rows import as_dtype, empty

PROGRAMS = 256
"""Target number of programs in the forward; kept low since programs that share the features of a tile of patches each generate its noise."""

# Size classes: none. BLOCK_K of the forward covers an entire patch of 64 values.
TABLE["patch_embed_forward"] = {
    (ANY, ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, warps=4, stages=1),
    ("bf16", ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, warps=4, stages=2),
    ("fp16", ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, warps=4, stages=2),
}
TABLE["patch_embed_grad_latents"] = {(ANY, ANY, ANY): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=3)}
TABLE["patch_embed_grad_weight"] = {(ANY, ANY, ANY): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, warps=8, stages=3)}
TABLE["patch_embed_vectors"] = {(ANY, ANY, ANY): Config({"BLOCK_N": 128, "BLOCK_D": 32}, warps=8, stages=1)}
TABLE["patch_embed_patches"] = {(ANY, ANY, ANY): Config({"BLOCK_M": 32, "BLOCK_K": 64}, warps=4, stages=1)}


@triton.jit
def _noise(
    rng, first_m, first_k, tokens, grid_w, channels,
    PATCH: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """eps of patches [first_m, first_m + BLOCK_M) and values [first_k, first_k + BLOCK_K), as elements of the contiguous [B, C, H, W]."""
    seed, offset = tl.load(rng), tl.load(rng + 1)
    width, height = grid_w * PATCH, tokens // grid_w * PATCH
    area = width.to(tl.int64) * height
    if IN_ORDER:
        # Four neighbours along x span two adjacent patches and form one block of random numbers, generated once.
        m, k = first_m + 2 * tl.arange(0, BLOCK_M // 2), first_k + 2 * tl.arange(0, BLOCK_K // 2)
        element = patch_offsets(m, k, tokens, grid_w, channels * area, area, width, PATCH)
        n0, n1, n2, n3 = philox.normals(seed, (element >> 2) + offset)
        quads = tl.join(tl.join(n0, n1), tl.join(n2, n3))  # [M / 2, K / 2, dx, patch of the two]
        return quads.permute(0, 3, 1, 2).reshape((BLOCK_M, BLOCK_K))
    else:
        m, k = first_m + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_K)
        return philox.normal_at(seed, offset, patch_offsets(m, k, tokens, grid_w, channels * area, area, width, PATCH))


@triton.jit
def _deviation(logvar):
    """exp(clamp(logvar) / 2), propagating NaN."""
    logvar = tl.where(logvar < -30.0, -30.0, logvar)
    return tl.exp(0.5 * tl.where(logvar > 20.0, 20.0, logvar))


@triton.jit
def _patches(
    latents, stride_b, stride_c, stride_h, rng, scale, shift, first_m, first_k, rows, tokens, grid_w, channels, dtype: tl.constexpr,
    PATCH: tl.constexpr, SAMPLE: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of patches of (z - shift) * scale in `dtype`, 0 outside."""
    m, k = first_m + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_K)
    mask = (m < rows)[:, None] & (k < channels * PATCH * PATCH)[None, :]
    at = latents + patch_offsets(m, k, tokens, grid_w, stride_b, stride_c, stride_h, PATCH)
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if SAMPLE:
        logvar = tl.load(at + channels.to(tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
        noise = _noise(rng, first_m, first_k, tokens, grid_w, channels, PATCH, IN_ORDER, BLOCK_M, BLOCK_K)
        value += _deviation(logvar) * noise
    return rounded(tl.where(mask, (value - shift) * scale, 0.0), dtype)


@kernel(do_not_specialize=["channels", "grid_w"])
def patch_embed_forward(
    latents, stride_b, stride_c, stride_h, weight, weight_stride, bias, pos_embed, cls_token, rng, scale, shift, y,
    rows, tokens, grid_w, channels, features, shares, share_tiles,
    PATCH: tl.constexpr, SAMPLE: tl.constexpr, IN_ORDER: tl.constexpr, CLS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program multiplies its tile of patches by its share of the features; WHOLE: K fits in one tile."""
    program = tl.program_id(0)
    first_m, share = program // shares * BLOCK_M, program % shares
    m = first_m + tl.arange(0, BLOCK_M)
    n = m % tokens
    row = (m // tokens).to(tl.int64) * (tokens + CLS) + CLS + n
    values = channels * PATCH * PATCH
    dtype: tl.constexpr = weight.dtype.element_ty
    if WHOLE:
        x = _patches(
            latents, stride_b, stride_c, stride_h, rng, scale, shift, first_m, 0, rows, tokens, grid_w, channels, dtype,
            PATCH, SAMPLE, IN_ORDER, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    for tile in range(share * share_tiles, (share + 1) * share_tiles):
        d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if WHOLE:
            k = tl.arange(0, BLOCK_K)
            at = weight + d.to(tl.int64)[:, None] * weight_stride + k[None, :]
            w = tl.load(at, mask=(d < features)[:, None] & (k < values)[None, :], other=0.0)
            total = dot(x, tl.trans(w), total)
        else:
            for first_k in range(0, values, BLOCK_K):
                k = first_k + tl.arange(0, BLOCK_K)
                x = _patches(
                    latents, stride_b, stride_c, stride_h, rng, scale, shift, first_m, first_k, rows, tokens, grid_w, channels,
                    dtype, PATCH, SAMPLE, IN_ORDER, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                at = weight + d.to(tl.int64)[:, None] * weight_stride + k[None, :]
                w = tl.load(at, mask=(d < features)[:, None] & (k < values)[None, :], other=0.0)
                total = dot(x, tl.trans(w), total)
        if bias is not None:
            total += tl.load(bias + d, mask=d < features, other=0.0).to(tl.float32)[None, :]
        mask = (m < rows)[:, None] & (d < features)[None, :]
        if pos_embed is not None:
            total += tl.load(pos_embed + (CLS + n)[:, None] * features + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y + row[:, None] * features + d[None, :], rounded(total, dtype), mask=mask)
        if CLS:
            # The program with an image's first patch writes its CLS row.
            cls_row = y + tl.cdiv(first_m, tokens).to(tl.int64) * (tokens + 1) * features + d
            for _ in range(tl.cdiv(first_m, tokens), tl.cdiv(tl.minimum(first_m + BLOCK_M, rows), tokens)):
                first = tl.load(cls_token + d, mask=d < features, other=0.0).to(tl.float32)
                if pos_embed is not None:
                    first += tl.load(pos_embed + d, mask=d < features, other=0.0).to(tl.float32)
                tl.store(cls_row, rounded(first, dtype), mask=d < features)
                cls_row += (tokens + 1) * features


@kernel(do_not_specialize=["channels", "grid_w"])
def patch_embed_grad_latents(
    grad_y, grad_stride_b, grad_stride_n, weight, weight_stride, latents, stride_b, stride_c, stride_h, rng, scale, grad_latents,
    rows, tokens, grid_w, channels, features, tiles,
    PATCH: tl.constexpr, MOMENTS: tl.constexpr, SAMPLE: tl.constexpr, IN_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dy W scattered to the patches' pixels; for moments, followed by the gradient of logvar."""
    program = tl.program_id(0)
    first_m, first_k = program // tiles * BLOCK_M, program % tiles * BLOCK_N
    m, k = first_m + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_N)
    values = channels * PATCH * PATCH
    grad_y += ((m // tokens).to(tl.int64) * grad_stride_b + (m % tokens).to(tl.int64) * grad_stride_n)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, features, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        upstream = tl.load(grad_y + d[None, :], mask=(m < rows)[:, None] & (d < features)[None, :], other=0.0)
        at = weight + d.to(tl.int64)[:, None] * weight_stride + k[None, :]
        w = tl.load(at, mask=(d < features)[:, None] & (k < values)[None, :], other=0.0)
        total = dot(upstream, w, total)
    total *= scale
    mask = (m < rows)[:, None] & (k < values)[None, :]
    width, height = grid_w * PATCH, tokens // grid_w * PATCH
    area = width.to(tl.int64) * height
    all_channels = channels * (2 if MOMENTS else 1)
    at = grad_latents + patch_offsets(m, k, tokens, grid_w, all_channels * area, area, width, PATCH)
    tl.store(at, rounded(total, grad_latents.dtype.element_ty), mask=mask)
    if MOMENTS:
        grad_logvar = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if SAMPLE:
            offsets = patch_offsets(m, k, tokens, grid_w, stride_b, stride_c, stride_h, PATCH)
            logvar = tl.load(latents + offsets + channels.to(tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
            slope = tl.where((logvar >= -30.0) & (logvar <= 20.0), 0.5, 0.0) * _deviation(logvar)
            noise = _noise(rng, first_m, first_k, tokens, grid_w, channels, PATCH, IN_ORDER, BLOCK_M, BLOCK_N)
            grad_logvar = slope * noise * total
        tl.store(at + channels * area, rounded(grad_logvar, grad_latents.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["channels", "grid_w"])
def patch_embed_patches(
    latents, stride_b, stride_c, stride_h, rng, scale, shift, x, rows, tokens, grid_w, channels, tiles,
    PATCH: tl.constexpr, SAMPLE: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [B N, K]: the patches that the forward multiplied."""
    program = tl.program_id(0)
    first_m, first_k = program // tiles * BLOCK_M, program % tiles * BLOCK_K
    values = channels * PATCH * PATCH
    tile = _patches(
        latents, stride_b, stride_c, stride_h, rng, scale, shift, first_m, first_k, rows, tokens, grid_w, channels, x.dtype.element_ty,
        PATCH, SAMPLE, IN_ORDER, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    m, k = first_m + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_K)
    tl.store(x + m.to(tl.int64)[:, None] * values + k[None, :], tile, mask=(m < rows)[:, None] & (k < values)[None, :])


@kernel(do_not_specialize=["tokens"])
def patch_embed_grad_weight(
    grad_y, grad_stride_b, grad_stride_n, x, partials, rows, tokens, features, values, split_rows, tiles_d, tiles_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Split-K partial products over the patches: partials [splits, D, K]. BLOCK_M counts features, BLOCK_N values, BLOCK_K patches."""
    program = tl.program_id(0)
    split = program // (tiles_d * tiles_k)
    d = program // tiles_k % tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
    k = program % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(split * split_rows, tl.minimum((split + 1) * split_rows, rows), BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        at = grad_y + ((m // tokens).to(tl.int64) * grad_stride_b + (m % tokens).to(tl.int64) * grad_stride_n)[:, None]
        upstream = tl.load(at + d[None, :], mask=(m < rows)[:, None] & (d < features)[None, :], other=0.0)
        at = x + m.to(tl.int64)[:, None] * values + k[None, :]
        patches = tl.load(at, mask=(m < rows)[:, None] & (k < values)[None, :], other=0.0)
        total = dot(tl.trans(upstream), patches, total)
    at = partials + (split * features + d).to(tl.int64)[:, None] * values + k[None, :]
    tl.store(at, rounded(total, partials.dtype.element_ty), mask=(d < features)[:, None] & (k < values)[None, :])


class _Sizes:
    """The sizes of a call, and its latents and weight in the layout that the kernels expect."""

    def __init__(self, latents, weight, rng, patch_size, moments):
        self.latents = latents if latents.stride(3) == 1 else latents.contiguous()
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.rng = None if rng is None else rng.contiguous()
        self.batch, channels, height, width = latents.shape
        self.channels = channels // 2 if moments else channels
        self.grid_w = width // patch_size
        self.tokens = height // patch_size * self.grid_w
        self.features, self.values = weight.shape
        self.rows = self.batch * self.tokens
        # A block of random numbers then covers one row of two adjacent 2 x 2 patches.
        self.in_order = patch_size == 2 and self.grid_w % 2 == 0
        self.dtype = TYPES[weight.dtype]

    @property
    def strides(self):
        return self.latents.stride()[:3]


def forward(latents, weight, bias, pos_embed, cls_token, rng, patch_size, scale, shift, moments):
    """y [B, (1+)N, D]."""
    s = _Sizes(latents, weight, rng, patch_size, moments)
    bias, pos_embed, cls_token = (None if v is None else v.contiguous() for v in (bias, pos_embed, cls_token))
    cls = int(cls_token is not None)
    y = torch.empty(s.batch, cls + s.tokens, s.features, dtype=weight.dtype, device=weight.device)
    config = pick("patch_embed_forward", s.dtype)
    patch_tiles = cdiv(s.rows, config.blocks["BLOCK_M"])
    shares, share_tiles = shares_of(s.features, patch_tiles, config.blocks["BLOCK_N"], PROGRAMS)
    patch_embed_forward[(patch_tiles * shares,)](
        s.latents, *s.strides, s.weight, s.weight.stride(0), bias, pos_embed, cls_token, s.rng, float(scale), float(shift), y,
        s.rows, s.tokens, s.grid_w, s.channels, s.features, shares, share_tiles,
        patch_size, s.rng is not None, s.in_order, cls, s.values <= config.blocks["BLOCK_K"], **config.options,
    )  # fmt: skip
    return y


def backward(
    grad_y, latents, weight, rng, patch_size, scale, shift, moments, need_latents, need_weight, need_bias, need_pos, need_cls
):
    """Gradients of latents, weight, bias, pos_embed and cls_token; empty tensors for those not needed."""
    s = _Sizes(latents, weight, rng, patch_size, moments)
    grad_y = grad_y if grad_y.stride(2) == 1 else grad_y.contiguous()
    cls = grad_y.shape[1] - s.tokens
    patches = grad_y[:, cls:]
    sample = s.rng is not None
    grad_latents, grad_weight = grad_y.new_empty(0), grad_y.new_empty(0)
    if need_latents:
        grad_latents = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
        config = pick("patch_embed_grad_latents", s.dtype)
        tiles = cdiv(s.values, config.blocks["BLOCK_N"])
        patch_embed_grad_latents[(cdiv(s.rows, config.blocks["BLOCK_M"]) * tiles,)](
            patches, *patches.stride()[:2], s.weight, s.weight.stride(0), s.latents, *s.strides, s.rng, float(scale), grad_latents,
            s.rows, s.tokens, s.grid_w, s.channels, s.features, tiles, patch_size, moments, sample, s.in_order, **config.options,
        )  # fmt: skip
    if need_weight:
        x = _written_patches(s, patch_size, scale, shift, weight.dtype)
        config = pick("patch_embed_grad_weight", s.dtype)
        tiles_d, tiles_k = cdiv(s.features, config.blocks["BLOCK_M"]), cdiv(s.values, config.blocks["BLOCK_N"])
        splits, split_rows = splits_of(s.rows, config.blocks["BLOCK_K"], tiles_d * tiles_k)
        grad_weight = grad_y.new_empty(s.features, s.values)
        partials = grad_weight if splits == 1 else grad_weight.new_empty(splits, s.features, s.values, dtype=torch.float32)
        patch_embed_grad_weight[(splits * tiles_d * tiles_k,)](
            patches, *patches.stride()[:2], x, partials, s.rows, s.tokens, s.features, s.values, split_rows, tiles_d, tiles_k,
            **config.options,
        )  # fmt: skip
        if splits > 1:
            sum_splits(partials, grad_weight)
    return grad_latents, grad_weight, *_vector_gradients(grad_y, patches, need_bias, need_pos, need_cls and cls == 1)


def _written_patches(s, patch_size, scale, shift, dtype):
    """The patches as a matrix [B N, K]."""
    x = torch.empty(s.rows, s.values, dtype=dtype, device=s.latents.device)
    config = pick("patch_embed_patches", s.dtype)
    tiles = cdiv(s.values, config.blocks["BLOCK_K"])
    patch_embed_patches[(cdiv(s.rows, config.blocks["BLOCK_M"]) * tiles,)](
        s.latents, *s.strides, s.rng, float(scale), float(shift), x, s.rows, s.tokens, s.grid_w, s.channels, tiles,
        patch_size, s.rng is not None, s.in_order, **config.options,
    )  # fmt: skip
    return x


@kernel
def patch_embed_vectors(
    sums, grad_bias, grad_cls, first, tokens, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """grad_bias: the sum of rows first to tokens of sums [tokens, width]; grad_cls: its row 0."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < width
    if grad_bias is not None:
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(first, tokens, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            at = n.to(tl.int64)[:, None] * width + d[None, :]
            total += tl.load(sums + at, mask=(n < tokens)[:, None] & inside[None, :], other=0)
        tl.store(grad_bias + d, rounded(tl.sum(total, 0), grad_bias.dtype.element_ty), mask=inside)
    if grad_cls is not None:
        row = tl.load(sums + d, mask=inside)
        tl.store(grad_cls + d, rounded(row, grad_cls.dtype.element_ty), mask=inside)


def _vector_gradients(grad_y, patches, need_bias, need_pos, need_cls):
    """Gradients of bias, pos_embed and cls_token. They share one sum over images, so the bits don't depend on which are needed."""
    width = grad_y.shape[2]
    if not (need_bias or need_pos or need_cls):
        return tuple(grad_y.new_empty(0) for _ in range(3))
    cls = grad_y.shape[1] - patches.shape[1]
    sums = sum_batches(grad_y if need_bias or need_pos else grad_y[:, :cls])
    grad_bias, grad_cls = empty(grad_y, width, need_bias), empty(grad_y, width, need_cls)
    if need_bias or need_cls:
        config = pick("patch_embed_vectors", "fp32")
        patch_embed_vectors[(cdiv(width, config.blocks["BLOCK_D"]),)](
            sums, grad_bias if need_bias else None, grad_cls if need_cls else None, cls, len(sums), width, **config.options
        )
    return grad_bias, as_dtype(sums, grad_y.dtype) if need_pos else empty(grad_y, 0), grad_cls
