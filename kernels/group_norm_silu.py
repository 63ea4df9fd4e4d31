"""Group normalisation and SiLU: ov3fast/ops/group_norm_silu.py.

x is viewed as [B, S, C] (NHWC) or [B, C, S] (NCHW), S being the flattened spatial axes; a tile is [spatial, channels] in either. Forward: (mean, sum of
squared deviations) of every channel in a strip of S, accurate for any mean since each tile is centred separately; merged in order into a group's mean and
rstd; then one elementwise pass. Backward: sums of dn and dn x_hat of every channel in a strip; merged over groups and over channels; then dx in one
pass. So x is read twice in each direction, and large images keep every multiprocessor busy whatever the number of groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._contracts import memory_format
from .lib.common import TYPES, cdiv, rounded, sum_over_rows
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel

# Size classes: "channels_last"; otherwise "plain", or "small" below 256 spatial positions.
for _name in ("group_norm_silu_forward", "group_norm_silu_backward"):
    TABLE[_name] = {
        (ANY, "channels_last", ANY): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=4, stages=1),
        (ANY, "plain", ANY): Config({"BLOCK_S": 512, "BLOCK_C": 4}, warps=4, stages=1),
        (ANY, "small", ANY): Config({"BLOCK_S": 64, "BLOCK_C": 32}, warps=4, stages=1),
    }
    TABLE[_name + "_partials"] = {
        (ANY, "channels_last", ANY): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=4, stages=1),
        ("fp32", "channels_last", ANY): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=8, stages=1),
        (ANY, "plain", ANY): Config({"BLOCK_S": 1024, "BLOCK_C": 4}, warps=4, stages=1),
        (ANY, "small", ANY): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=4, stages=1),
        ("fp32", "small", ANY): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=8, stages=1),
    }
TABLE["group_norm_silu_statistics"] = {(ANY, ANY, ANY): Config({"BLOCK": 256}, warps=4, stages=1)}
TABLE["group_norm_silu_backward_groups"] = {(ANY, ANY, ANY): Config({"BLOCK": 256}, warps=4, stages=1)}
TABLE["group_norm_silu_backward_channels"] = {(ANY, ANY, ANY): Config({"BLOCK_R": 64, "BLOCK_C": 32}, warps=4, stages=1)}


# Target number of programs for a reduction over a large image: a few waves on the largest chips. A constant rather than the device's, so that results
# are the same on all chips.
PROGRAMS = 1024


@triton.jit
def _tile(pointer, stride_row, s, c, spatial, channels, CHANNELS_LAST: tl.constexpr):
    """x[s, c] in float32, 0 outside."""
    mask = (s < spatial)[:, None] & (c < channels)[None, :]
    if CHANNELS_LAST:
        offsets = s.to(tl.int64)[:, None] * stride_row + c[None, :]
    else:
        offsets = s[:, None] + c.to(tl.int64)[None, :] * stride_row
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(pointer, value, s, c, spatial, channels, CHANNELS_LAST: tl.constexpr):
    """Stores into a contiguous [S, C] or [C, S]."""
    mask = (s < spatial)[:, None] & (c < channels)[None, :]
    if CHANNELS_LAST:
        offsets = s.to(tl.int64)[:, None] * channels + c[None, :]
    else:
        offsets = s[:, None] + c.to(tl.int64)[None, :] * spatial
    tl.store(pointer + offsets, rounded(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _affine(weight, bias, mean, rstd, b, c, channels, groups):
    """Per channel: weight, bias, and its group's mean and rstd."""
    mask = c < channels
    group = b * groups + c // (channels // groups)
    return (
        tl.load(weight + c, mask=mask, other=0.0).to(tl.float32),
        tl.load(bias + c, mask=mask, other=0.0).to(tl.float32),
        tl.load(mean + group, mask=mask, other=0.0),
        tl.load(rstd + group, mask=mask, other=0.0),
    )


@triton.jit
def _silu_gradient(grad_y, n):
    gate = 1.0 / (1.0 + tl.exp(-n))
    return grad_y * gate * (1.0 + n * (1.0 - gate))


@kernel
def group_norm_silu_forward_partials(
    x, stride_b, stride_row, partials, channels, spatial, strips, strip_spatial, channel_blocks,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over a strip of S: partials [B, strips, 2, C]."""
    program = tl.program_id(0)
    strip_of_all = program // channel_blocks
    b, strip = strip_of_all // strips, strip_of_all % strips
    c = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += b.to(tl.int64) * stride_b
    first = strip * strip_spatial
    last = tl.minimum(first + strip_spatial, spatial)

    count = 0.0
    mean, squares = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        value = _tile(x, stride_row, s, c, spatial, channels, CHANNELS_LAST)
        size = tl.minimum(last - start, BLOCK_S).to(tl.float32)
        inside = (s < spatial)[:, None]
        tile_mean = sum_over_rows(value) / size
        centred = tl.where(inside, value - tile_mean[None, :], 0.0)
        # Corrects the rounding of the mean, which matters far from zero.
        rest = sum_over_rows(centred) / size
        # The select keeps the product from being fused into the sum's first addition: lanes that add each other's squares would then round
        # differently and race to store different results to one address.
        tile_squares = sum_over_rows(tl.where(inside, centred * centred, 0.0))
        total = count + size
        delta = tile_mean - mean + rest
        mean += delta * (size / total)
        squares += tile_squares - rest * rest * size + delta * delta * (count * size / total)
        count = total

    partials += strip_of_all.to(tl.int64) * 2 * channels
    tl.store(partials + c, mean, mask=c < channels)
    tl.store(partials + channels + c, squares, mask=c < channels)


@kernel
def group_norm_silu_statistics(
    partials, mean, rstd, channels, groups, spatial, strips, strip_spatial, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Merges a group's partials into mean and rstd [B, G], in float64, so that means far from zero lose no precision."""
    program = tl.program_id(0)
    per_group = channels // groups
    partials += (program // groups).to(tl.int64) * strips * 2 * channels + (program % groups) * per_group
    n = strips * per_group

    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        strip = i // per_group
        size = tl.minimum(spatial - strip * strip_spatial, strip_spatial).to(tl.float64)
        value = tl.load(partials + strip.to(tl.int64) * 2 * channels + i % per_group, mask=i < n, other=0.0)
        total += tl.where(i < n, value.to(tl.float64) * size, 0.0)
    values = (per_group * 1.0 * spatial).to(tl.float64)
    group_mean = tl.sum(total, 0) / values

    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        strip = i // per_group
        size = tl.minimum(spatial - strip * strip_spatial, strip_spatial).to(tl.float64)
        at = partials + strip.to(tl.int64) * 2 * channels + i % per_group
        delta = tl.load(at, mask=i < n, other=0.0).to(tl.float64) - group_mean
        squares = tl.load(at + channels, mask=i < n, other=0.0).to(tl.float64)
        total += tl.where(i < n, squares + delta * delta * size, 0.0)
    variance = tl.sum(total, 0) / values
    tl.store(mean + program, group_mean)
    tl.store(rstd + program, 1.0 / tl.sqrt(variance + eps))


@kernel
def group_norm_silu_forward(
    x, stride_b, stride_row, weight, bias, mean, rstd, y, channels, spatial, groups, channel_blocks, spatial_blocks,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    s, c, b = _tile_of(program, channel_blocks, spatial_blocks, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    w, shift, group_mean, group_rstd = _affine(weight, bias, mean, rstd, b, c, channels, groups)
    value = _tile(x + b.to(tl.int64) * stride_b, stride_row, s, c, spatial, channels, CHANNELS_LAST)
    n = (value - group_mean[None, :]) * (group_rstd * w)[None, :] + shift[None, :]
    result = n / (1.0 + tl.exp(-n))
    _store_tile(y + b.to(tl.int64) * spatial * channels, result, s, c, spatial, channels, CHANNELS_LAST)


@triton.jit
def _tile_of(
    program, channel_blocks, spatial_blocks, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Spatial and channel indices and the batch index of an elementwise program; neighbours in memory are neighbours in the grid."""
    if CHANNELS_LAST:
        c_block, s_block = program % channel_blocks, program // channel_blocks % spatial_blocks
    else:
        s_block, c_block = program % spatial_blocks, program // spatial_blocks % channel_blocks
    s = s_block * BLOCK_S + tl.arange(0, BLOCK_S)
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    return s, c, program // (channel_blocks * spatial_blocks)


@kernel
def group_norm_silu_backward_partials(
    grad_y, grad_stride_b, grad_stride_row, x, stride_b, stride_row, weight, bias, mean, rstd, partials,
    channels, spatial, groups, strips, strip_spatial, channel_blocks,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dn and dn x_hat of each channel over a strip of S: partials [B, strips, 2, C]."""
    program = tl.program_id(0)
    strip_of_all = program // channel_blocks
    b, strip = strip_of_all // strips, strip_of_all % strips
    c = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    w, shift, group_mean, group_rstd = _affine(weight, bias, mean, rstd, b, c, channels, groups)
    x += b.to(tl.int64) * stride_b
    grad_y += b.to(tl.int64) * grad_stride_b
    first = strip * strip_spatial
    last = tl.minimum(first + strip_spatial, spatial)

    sums, dots = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        x_hat = (_tile(x, stride_row, s, c, spatial, channels, CHANNELS_LAST) - group_mean[None, :]) * group_rstd[None, :]
        upstream = _tile(grad_y, grad_stride_row, s, c, spatial, channels, CHANNELS_LAST)
        grad_n = _silu_gradient(upstream, x_hat * w[None, :] + shift[None, :])
        # grad_y is 0 outside, but 0 times an infinite slope is NaN.
        inside = (s < spatial)[:, None]
        sums += sum_over_rows(tl.where(inside, grad_n, 0.0))
        dots += sum_over_rows(tl.where(inside, grad_n * x_hat, 0.0))

    partials += strip_of_all.to(tl.int64) * 2 * channels
    tl.store(partials + c, sums, mask=c < channels)
    tl.store(partials + channels + c, dots, mask=c < channels)


@kernel
def group_norm_silu_backward_groups(partials, weight, means, channels, groups, spatial, strips, BLOCK: tl.constexpr):
    """Means over a group of w dn and w dn x_hat: means [B, G, 2]."""
    program = tl.program_id(0)
    per_group = channels // groups
    group = program % groups
    partials += (program // groups).to(tl.int64) * strips * 2 * channels
    n = strips * per_group
    sums, dots = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        c = group * per_group + i % per_group
        at = partials + (i // per_group).to(tl.int64) * 2 * channels + c
        w = tl.load(weight + c, mask=i < n, other=0.0).to(tl.float32)
        sums += w * tl.load(at, mask=i < n, other=0.0)
        dots += w * tl.load(at + channels, mask=i < n, other=0.0)
    values = per_group * 1.0 * spatial
    tl.store(means + 2 * program, tl.sum(sums, 0) / values)
    tl.store(means + 2 * program + 1, tl.sum(dots, 0) / values)


@kernel
def group_norm_silu_backward_channels(
    partials, grad_weight, grad_bias, channels, rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Sums of partials [rows, 2, C] over batches and strips: grad_bias from dn, grad_weight from dn x_hat."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums, dots = tl.zeros((BLOCK_R, BLOCK_C), tl.float32), tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        at = partials + row.to(tl.int64)[:, None] * 2 * channels + c[None, :]
        sums += tl.load(at, mask=mask, other=0.0)
        dots += tl.load(at + channels, mask=mask, other=0.0)
    dtype: tl.constexpr = grad_weight.dtype.element_ty
    tl.store(grad_bias + c, rounded(tl.sum(sums, 0), dtype), mask=c < channels)
    tl.store(grad_weight + c, rounded(tl.sum(dots, 0), dtype), mask=c < channels)


@kernel
def group_norm_silu_backward(
    grad_y, grad_stride_b, grad_stride_row, x, stride_b, stride_row, weight, bias, mean, rstd, means, grad_x,
    channels, spatial, groups, channel_blocks, spatial_blocks,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (w dn - mean_g(w dn) - x_hat mean_g(w dn x_hat))."""
    program = tl.program_id(0)
    s, c, b = _tile_of(program, channel_blocks, spatial_blocks, CHANNELS_LAST, BLOCK_S, BLOCK_C)
    w, shift, group_mean, group_rstd = _affine(weight, bias, mean, rstd, b, c, channels, groups)
    at = means + 2 * (b * groups + c // (channels // groups))
    mean_sum, mean_dot = tl.load(at, mask=c < channels, other=0.0), tl.load(at + 1, mask=c < channels, other=0.0)
    value = _tile(x + b.to(tl.int64) * stride_b, stride_row, s, c, spatial, channels, CHANNELS_LAST)
    upstream = _tile(grad_y + b.to(tl.int64) * grad_stride_b, grad_stride_row, s, c, spatial, channels, CHANNELS_LAST)
    x_hat = (value - group_mean[None, :]) * group_rstd[None, :]
    grad_n = _silu_gradient(upstream, x_hat * w[None, :] + shift[None, :])
    result = (grad_n * w[None, :] - mean_sum[None, :] - x_hat * mean_dot[None, :]) * group_rstd[None, :]
    _store_tile(grad_x + b.to(tl.int64) * spatial * channels, result, s, c, spatial, channels, CHANNELS_LAST)


class _View:
    """x as NHWC or NCHW: its sizes, and how it is divided into strips and tiles."""

    def __init__(self, x, groups: int, pass_name: str):
        self.batch, self.channels, self.groups, self.spatial = *x.shape[:2], groups, x.shape[2:].numel()
        self.channels_last = memory_format(x) != torch.contiguous_format or (self.spatial == 1 and x.is_contiguous())
        self.dtype = TYPES[x.dtype]
        size = size_class(self.channels_last, self.spatial)
        self.config = pick(pass_name, self.dtype, size)
        self.reduce_config = pick(pass_name + "_partials", self.dtype, size)
        self.strips, self.strip_spatial = strips(self.batch, self.channels, self.spatial, self.reduce_config.blocks)

    @property
    def empty(self) -> bool:
        return self.batch * self.channels * self.spatial == 0

    def layout(self, x):
        """x, its batch stride, and its stride over channels (NCHW) or S (NHWC); copies if the other axis is not contiguous."""
        if self.channels_last:
            x = x.reshape(self.batch, self.channels, self.spatial)
            x = x if x.stride(1) == 1 or self.channels == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)
            return x, x.stride(0), x.stride(2)
        x = x.reshape(self.batch, self.channels, self.spatial)
        x = x if x.stride(2) == 1 or self.spatial == 1 else x.contiguous()
        return x, x.stride(0), x.stride(1)

    def elementwise(self):
        """Grid and last arguments of an elementwise pass."""
        channel_blocks, spatial_blocks = (
            cdiv(self.channels, self.config.blocks["BLOCK_C"]), cdiv(self.spatial, self.config.blocks["BLOCK_S"])
        )  # fmt: skip
        grid = (self.batch * channel_blocks * spatial_blocks,)
        return grid, (self.channels, self.spatial, self.groups, channel_blocks, spatial_blocks, self.channels_last)

    def reduction(self):
        """Grid of the partial sums, and the number of channel blocks."""
        channel_blocks = cdiv(self.channels, self.reduce_config.blocks["BLOCK_C"])
        return (self.batch * self.strips * channel_blocks,), channel_blocks


def size_class(channels_last: bool, spatial: int) -> str:
    return "channels_last" if channels_last else "plain" if spatial >= 256 else "small"


def strips(batch: int, channels: int, spatial: int, blocks) -> tuple[int, int]:
    """Number of strips of a reduction, and their length along S."""
    tiles = cdiv(spatial, blocks["BLOCK_S"])
    wanted = min(tiles, cdiv(PROGRAMS, max(1, batch * cdiv(channels, blocks["BLOCK_C"]))))
    strip_tiles = cdiv(tiles, max(1, wanted))
    return cdiv(tiles, max(1, strip_tiles)), strip_tiles * blocks["BLOCK_S"]


def forward(x, num_groups, weight, bias, eps):
    """y, mean, rstd."""
    view = _View(x, num_groups, "group_norm_silu_forward")
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean = torch.empty(view.batch, num_groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if view.empty:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    x, *strides = view.layout(x)
    weight, bias = weight.contiguous(), bias.contiguous()
    grid, channel_blocks = view.reduction()
    partials = torch.empty(view.batch, view.strips, 2, view.channels, dtype=torch.float32, device=x.device)
    group_norm_silu_forward_partials[grid](
        x, *strides, partials, view.channels, view.spatial, view.strips, view.strip_spatial, channel_blocks, view.channels_last,
        **view.reduce_config.options,
    )  # fmt: skip
    group_norm_silu_statistics[(view.batch * num_groups,)](
        partials, mean, rstd, view.channels, num_groups, view.spatial, view.strips, view.strip_spatial, eps,
        **pick("group_norm_silu_statistics", "fp32").options,
    )  # fmt: skip
    grid, rest = view.elementwise()
    group_norm_silu_forward[grid](x, *strides, weight, bias, mean, rstd, y, *rest, **view.config.options)
    return y, mean, rstd


def backward(grad_y, x, weight, bias, mean, rstd, need_x, need_weight, need_bias):
    """Gradients of x, weight and bias; empty tensors for those not needed."""
    view = _View(x, mean.shape[1], "group_norm_silu_backward")
    none = x.new_empty(0)
    grad_x = torch.empty_like(x, memory_format=memory_format(x)) if need_x else none
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    if view.empty:
        grad_weight.zero_()
        grad_bias.zero_()
    else:
        (x, *strides), (grad_y, *grad_strides) = view.layout(x), view.layout(grad_y)
        weight, bias, mean, rstd = weight.contiguous(), bias.contiguous(), mean.contiguous(), rstd.contiguous()
        inputs = grad_y, *grad_strides, x, *strides, weight, bias, mean, rstd
        grid, channel_blocks = view.reduction()
        partials = torch.empty(view.batch, view.strips, 2, view.channels, dtype=torch.float32, device=x.device)
        group_norm_silu_backward_partials[grid](
            *inputs, partials, view.channels, view.spatial, view.groups, view.strips, view.strip_spatial, channel_blocks, view.channels_last,
            **view.reduce_config.options,
        )  # fmt: skip
        if need_weight or need_bias:
            config = pick("group_norm_silu_backward_channels", "fp32")
            group_norm_silu_backward_channels[(cdiv(view.channels, config.blocks["BLOCK_C"]),)](
                partials, grad_weight, grad_bias, view.channels, view.batch * view.strips, **config.options
            )
        if need_x:
            means = torch.empty(view.batch, view.groups, 2, dtype=torch.float32, device=x.device)
            group_norm_silu_backward_groups[(view.batch * view.groups,)](
                partials, weight, means, view.channels, view.groups, view.spatial, view.strips,
                **pick("group_norm_silu_backward_groups", "fp32").options,
            )  # fmt: skip
            grid, rest = view.elementwise()
            group_norm_silu_backward[grid](*inputs, means, grad_x, *rest, **view.config.options)
    return grad_x, grad_weight if need_weight else none, grad_bias if need_bias else none
