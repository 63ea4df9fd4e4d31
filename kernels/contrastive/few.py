"""contrastive_loss of a few pairs, all of one process: two launches forward and three backward, since the host takes longer than the GPU.

Forward: each program computes a tile of logits and its rows' and columns' (max, sum of exponentials relative to it); one program merges these and
adds up the loss. Backward: each program computes a tile of G, the gradients of the loss by <x_i, y_j>; G y and G^T x, the gradients with norms held
fixed, are linear.py's; the last launch takes both sides through the normalisation and adds up the gradients of scale and bias. All in
float32, as everywhere up to FEW columns. G [N, N] is kept no longer than the backward takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import linear
from ..lib.common import TYPES, cdiv, dot
from ..lib.config import Config, pick
from ..lib.launch import kernel
from ..lib.rows import Rows, empty, rows
from .config import FEW
from .launch import Side, finish
from .rows import load_tile, norm_of
from .tiles import sigmoid, softplus, store_total


@triton.jit
def _logits(
    x, x_stride, y, y_stride, scale, bias, i, j, pairs, width, SIGMOID: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """z and cosines of rows i and j, [BLOCK, BLOCK], and 1 / (|x_i| |y_j|); z is -inf outside, and with SIGMOID of the other sign where i = j."""
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    x_squares = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    y_squares = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for start in range(0, width, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a = load_tile(x, x_stride, i, d, pairs, width)
        b = load_tile(y, y_stride, j, d, pairs, width)
        x_squares += a * a
        y_squares += b * b
        products = dot(a, tl.trans(b), products)
    x_norm, _ = norm_of(x_squares)
    y_norm, _ = norm_of(y_squares)
    inverse = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), x_norm)[:, None] * tl.div_rn(1.0, y_norm)[None, :]
    cosine = products * inverse
    z = tl.load(scale).to(tl.float32) * cosine
    if bias is not None:
        z += tl.load(bias).to(tl.float32)
    if SIGMOID:
        z = tl.where(i[:, None] == j[None, :], -z, z)
    return tl.where((i < pairs)[:, None] & (j < pairs)[None, :], z, float("-inf")), cosine, inverse


@kernel
def contrastive_few_statistics(
    x, x_stride, y, y_stride, scale, bias, parts, own, pairs, width,
    SIGMOID: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (m, n): the tile of rows m and columns n. parts [side, tiles, 2, pairs]: (max, sum of exponentials relative to it) of its rows
    at [0, n] and columns at [1, m]; own [pairs]: z_ii. With SIGMOID parts[0, n, 0] are its rows' sums of softplus."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z, _, _ = _logits(x, x_stride, y, y_stride, scale, bias, i, j, pairs, width, SIGMOID, BLOCK, BLOCK_K)
    row = parts + tl.program_id(1) * 2 * pairs + i
    if SIGMOID:
        tl.store(row, tl.sum(softplus(z), 1), mask=i < pairs)
    else:
        column = parts + (tl.num_programs(0) + tl.program_id(0)) * 2 * pairs + j
        row_m, column_m = tl.max(z, 1), tl.max(z, 0)
        tl.store(row, row_m, mask=i < pairs)
        tl.store(row + pairs, tl.sum(tl.exp(z - row_m[:, None]), 1), mask=i < pairs)
        tl.store(column, column_m, mask=j < pairs)
        tl.store(column + pairs, tl.sum(tl.exp(z - column_m[None, :]), 0), mask=j < pairs)
        if tl.program_id(0) == tl.program_id(1):
            tl.store(own + i, tl.sum(tl.where(i[:, None] == j[None, :], z, 0.0), 1), mask=i < pairs)


@triton.jit
def _merged(parts, lse, i, tiles, pairs, PARTS: tl.constexpr):
    """(max, log of the sum relative to it) of one side's parts [tiles, 2, pairs], stored in lse [2, pairs] too."""
    tile = tl.arange(0, PARTS)[:, None]
    part, there = parts + tile * 2 * pairs + i[None, :], (tile < tiles) & (i < pairs)[None, :]
    part_m = tl.load(part, mask=there, other=float("-inf"))
    part_l = tl.load(part + pairs, mask=there, other=0.0)
    m_i = tl.where(i < pairs, tl.max(part_m, 0), 0.0)
    log_sum = tl.log(tl.sum(part_l * tl.exp(part_m - m_i[None, :]), 0))
    tl.store(lse + i, m_i, mask=i < pairs)
    tl.store(lse + pairs + i, log_sum, mask=i < pairs)
    return m_i, log_sum


@kernel
def contrastive_few_loss(
    parts, own, loss, row_lse, column_lse, tiles, pairs, SIGMOID: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the loss, and with softmax row_lse and column_lse [2, pairs], from what contrastive_few_statistics wrote."""
    i = tl.arange(0, BLOCK)
    if SIGMOID:
        tile = tl.arange(0, PARTS)[:, None]
        sums = tl.load(parts + tile * 2 * pairs + i[None, :], mask=(tile < tiles) & (i < pairs)[None, :], other=0.0)
        losses = tl.sum(sums, 0)
        share = 1.0
    else:
        row_m, row_log = _merged(parts, row_lse, i, tiles, pairs, PARTS)
        column_m, column_log = _merged(parts + tiles * 2 * pairs, column_lse, i, tiles, pairs, PARTS)
        mine = tl.load(own + i, mask=i < pairs, other=0.0)
        losses = tl.where(i < pairs, (row_m - mine) + row_log + (column_m - mine) + column_log, 0.0)
        share = 0.5
    tl.store(loss, (tl.sum(losses.to(tl.float64), 0) * share / pairs).to(tl.float32))


@kernel
def contrastive_few_gradients(
    x, x_stride, y, y_stride, scale, bias, grad_loss, row_lse, column_lse, gradients, sums, gradients_stride, pairs, width,
    SIGMOID: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of gradients [pairs, gradients_stride], d loss / d <x_i, y_j>, where not None. sums [2, tiles, tiles], float64: those of d loss / d z times
    the cosine, and with SIGMOID of d loss / d z."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z, cosine, inverse = _logits(x, x_stride, y, y_stride, scale, bias, i, j, pairs, width, SIGMOID, BLOCK, BLOCK_K)
    pair, s = i[:, None] == j[None, :], tl.load(scale).to(tl.float32)
    inside = (i < pairs)[:, None] & (j < pairs)[None, :]
    if SIGMOID:
        # 1 - sigmoid(z) as sigmoid(-z), without cancellation.
        g = sigmoid(z)
        g = tl.where(pair, -g, g)
    else:
        row_m, row_log = _statistics(row_lse, i, pairs)
        column_m, column_log = _statistics(column_lse, j, pairs)
        g = tl.exp((z - row_m[:, None]) - row_log[:, None]) + tl.exp((z - column_m[None, :]) - column_log[None, :])
        g = 0.5 * g - tl.where(pair, 1.0, 0.0)
        # All g add up to 0, but for their rounding errors, which would be weighted by the cosines, mostly those of the rows' best columns.
        every = tl.arange(0, MOST)
        center = tl.sum(tl.load(row_lse + every, mask=every < pairs, other=0.0), 0) / pairs
        cosine -= tl.where(s == 0, 0.0, center / s)
    g = tl.where(inside, g * (tl.load(grad_loss).to(tl.float32) / pairs), 0.0)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    store_total(sums + place, g * cosine)
    if SIGMOID:
        store_total(sums + tl.num_programs(0) * tl.num_programs(1) + place, g)
    if gradients is not None:
        tl.store(gradients + i[:, None] * gradients_stride + j[None, :], g * s * inverse, mask=inside)


@triton.jit
def _statistics(lse, i, pairs):
    return tl.load(lse + i, mask=i < pairs, other=0.0), tl.load(lse + pairs + i, mask=i < pairs, other=0.0)


def _tiled(image: Tensor, text: Tensor) -> tuple[Rows, Rows, Config, int]:
    """Both sides' rows, and the tiles' configuration and number along one side."""
    x, config = rows(image), pick("contrastive_few_statistics", TYPES[image.dtype])
    return x, rows(text), config, cdiv(x.count, config.blocks["BLOCK"])


def forward(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """image, text [N, D] with 0 < N <= FEW -> loss, and with softmax the rows' and columns' (max, log-sum) [2, N]."""
    x, y, config, tiles = _tiled(image, text)
    pairs, of_sigmoid = x.count, kind == "sigmoid"
    loss = empty(image, (), dtype=torch.float32)
    row_lse, column_lse = (empty(image, (2, 0 if of_sigmoid else pairs), dtype=torch.float32) for _ in range(2))
    parts = empty(image, (4 * tiles + 1, pairs), dtype=torch.float32)
    contrastive_few_statistics[(tiles, tiles)](
        x.tensor, x.outer_stride, y.tensor, y.outer_stride, scale, bias, parts, parts[-1], pairs, x.width,
        SIGMOID=of_sigmoid, **config.options,
    )  # fmt: skip
    contrastive_few_loss[(1,)](
        parts, parts[-1], loss, row_lse, column_lse, tiles, pairs,
        SIGMOID=of_sigmoid, PARTS=cdiv(FEW, config.blocks["BLOCK"]), **pick("contrastive_few_loss", "fp32").options,
    )  # fmt: skip
    return loss, row_lse, column_lse


def backward(
    grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, row_lse: Tensor, column_lse: Tensor,
    kind: str, need_image: bool, need_text: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of image, text, scale and bias; empty or meaningless for what is not there or not needed."""
    x, y, config, tiles = _tiled(image, text)
    pairs, of_sigmoid = x.count, kind == "sigmoid"
    gradients = rows(empty(image, (pairs, cdiv(pairs, 16) * 16), dtype=torch.float32)[:, :pairs])
    sums = empty(image, (2, tiles * tiles), dtype=torch.float64)
    contrastive_few_gradients[(tiles, tiles)](
        x.tensor, x.outer_stride, y.tensor, y.outer_stride, scale, bias, grad_loss, row_lse, column_lse,
        gradients.tensor if need_image or need_text else None, sums, gradients.outer_stride, pairs, x.width,
        SIGMOID=of_sigmoid, MOST=FEW, **config.options,
    )  # fmt: skip
    by_image, by_text, _ = linear.small_gradients(gradients, x, y.tensor, need_image, need_text, False, torch.float32)
    in_place = image.dtype == torch.float32
    grad_image = by_image if in_place else empty(image, image.shape, need_image)
    grad_text = by_text if in_place else empty(text, text.shape, need_text)
    grad_scale, grad_bias = empty(scale, ()), empty(scale if bias is None else bias, ())
    sides = (
        Side(x.tensor, by_image, grad_image if need_image else None), Side(y.tensor, by_text, grad_text if need_text else None)
    )  # fmt: skip
    finish(*sides, True, sums=sums, scalars=(grad_scale, grad_bias), TOTAL=of_sigmoid, BIAS=of_sigmoid)
    return grad_image, grad_text, grad_scale, grad_bias
