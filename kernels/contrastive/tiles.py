"""contrastive_loss, kernels over tiles of pairs: statistics of logits, gradients with respect to logits.

Rows i < n of x are paired with rows j < N of y; the positive of row i is j = i + offset. Tiles are [columns, rows]: a thread's elements of a product lie
mostly along the second axis, so reductions over a block's rows, which every tile of columns needs, stay within four threads. Out-of-bounds logits are -inf:
adding 0 or -inf to s <a_i, b_j> masks it, and also forces the product to be rounded, whether fused or not, before anything is subtracted from it. A tile's
cosines are x_i y_j times 1/|y_j| and 1/|x_i| in float32 (or ones, for unit rows), or come from a buffer of cuBLAS products (CUBLAS). Both kernels use
the same BLOCK_K and multiply in the same order, so that the backward recomputes the forward's logits bit for bit.

One exponential per logit serves both softmaxes if all are of z - shift(s): sums over rows and over columns add the same numbers, and a gradient is
exp(z - shift) times the sum of a row factor and a column factor. The shift is 0 up to |s| = REACH, so only a row or column whose logits are all
far below the largest possible one underflows: then every row and column uses its own maximum, at two exponentials per logit.
"""

import triton
import triton.language as tl

from ..lib.common import dot
from ..lib.launch import kernel

REACH: tl.constexpr = tl.constexpr(64.0)
"""exp(REACH) leaves headroom for 2^34 summands."""
SMALLEST: tl.constexpr = tl.constexpr(2.0**-80)
"""Underflow loses 2^-126 per logit, which is negligible in sums above this."""
LARGEST: tl.constexpr = tl.constexpr(2.0**120)


@triton.jit
def shift_of(s):
    return tl.maximum(tl.abs(s) - REACH, 0.0)


@triton.jit
def _products(
    x, y, products, y_inverse, i, j, x_stride, y_stride, products_stride, n, N, width,
    CUBLAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> / |y_j| of columns j and rows i, [BLOCK_N, BLOCK_M]; 0 outside."""
    if CUBLAS:
        pointers = products + i[None, :].to(tl.int64) * products_stride + j[:, None]
        tile = tl.load(pointers, mask=(i < n)[None, :] & (j < N)[:, None], other=0.0)
    else:
        tile = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        x_row = x + i[:, None].to(tl.int64) * x_stride
        y_row = y + j[:, None].to(tl.int64) * y_stride
        for start in range(0, width, BLOCK_K):
            d = start + tl.arange(0, BLOCK_K)[None, :]
            a = tl.load(x_row + d, mask=(i < n)[:, None] & (d < width), other=0.0)
            b = tl.load(y_row + d, mask=(j < N)[:, None] & (d < width), other=0.0)
            tile = dot(b, tl.trans(a), tile)
    return tile * tl.load(y_inverse + j, mask=j < N, other=0.0)[:, None]


@triton.jit
def _logits(tile, s, x_inverse, i, n):
    """[BLOCK_N, BLOCK_M], -inf for rows outside."""
    by_row = s * tl.load(x_inverse + i, mask=i < n, other=0.0)
    return tile * by_row[None, :] + _outside(i, n)[None, :]


@triton.jit
def _outside(i, n):
    return tl.where(i < n, 0.0, float("-inf"))


@triton.jit
def softplus(z):
    # log(1 + e) = 2 artanh(e / (2 + e)), by its series: accurate for small e, and without a logarithm.
    e = tl.exp(-tl.abs(z))
    t = e / (2.0 + e)
    s = t * t
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))))))
    return tl.where(z > 0, z, 0.0) + 2.0 * t * series


@triton.jit
def sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@kernel
def contrastive_statistics(
    x,
    y,
    products,
    x_inverse,
    y_inverse,
    scale,
    bias,
    row_parts,
    column_parts,
    own,
    far,
    x_stride,
    y_stride,
    products_stride,
    row_parts_stride,
    n,
    N,
    width,
    offset,
    segment,
    SIGMOID: tl.constexpr,
    CUBLAS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (m, c): the rows of tile m against `segment` tiles of columns from c * segment on.

    softmax: row_parts [segments, 2, row_parts_stride] and column_parts [row tiles, 2, N] of (shift, sum of exponentials relative to
    it), and own [n], the logits of the positives. sigmoid: row_parts [segments, row_parts_stride], sums of softplus.
    SHARED: one shift for all; far [segments, row tiles] flags the programs where that lost precision. Otherwise the shifts are maxima, for the
    flagged programs or, without `far`, for all.
    """
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if far is not None and not SHARED:
        if tl.load(far + place) == 0:
            return
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * segment * BLOCK_N
    end = tl.minimum(first + segment * BLOCK_N, N)
    s = tl.load(scale)
    t = tl.load(bias) if bias is not None else 0.0
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_N // 2, BLOCK_M), tl.float32)
    first_own = tl.program_id(0) * BLOCK_M + offset
    own_column = tl.where(i < n, i + offset, -1)
    if SHARED:
        shift = shift_of(s)
        m_i = tl.zeros((BLOCK_M,), tl.float32) + shift
        lost = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(first, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        tile = _products(
            x, y, products, y_inverse, i, j, x_stride, y_stride, products_stride, n, N, width, CUBLAS, BLOCK_M, BLOCK_N, BLOCK_K
        )
        has_own = (start < first_own + BLOCK_M) & (start + BLOCK_N > first_own)
        if SIGMOID:
            z = (_logits(tile, s, x_inverse, i, n) + t) + _outside(j, N)[:, None]
            if has_own:
                z = tl.where(own_column[None, :] == j[:, None], -z, z)
            sums += _halves(softplus(z))
        else:
            z = _logits(tile, s, x_inverse, i, n) + _outside(j, N)[:, None]
            if has_own:
                tl.store(own + (i[None, :] + 0 * j[:, None]), z, mask=own_column[None, :] == j[:, None])
            if SHARED:
                e = _exp(z - shift)
                sums += _halves(e)
                m_j = tl.zeros((BLOCK_N,), tl.float32) + shift
                l_j = tl.sum(e, 1)
                lost |= ((j < N) & _loses_digits(l_j)).to(tl.int32)
            else:
                before = m_i
                m_i = tl.maximum(before, tl.max(z, 0))
                l_i = l_i * tl.exp(before - m_i) + tl.sum(tl.exp(z - m_i[None, :]), 0)
                m_j = tl.max(z, 1)
                l_j = tl.sum(tl.exp(z - m_j[:, None]), 1)
            column = column_parts + tl.program_id(0).to(tl.int64) * 2 * N + j
            tl.store(column, m_j, mask=j < N)
            tl.store(column + N, l_j, mask=j < N)
    if SIGMOID or SHARED:
        l_i = tl.sum(sums, 0)
    if SIGMOID:
        tl.store(row_parts + tl.program_id(1).to(tl.int64) * row_parts_stride + i, l_i, mask=i < n)
    else:
        row = row_parts + tl.program_id(1).to(tl.int64) * 2 * row_parts_stride + i
        tl.store(row, m_i, mask=i < n)
        tl.store(row + row_parts_stride, l_i, mask=i < n)
    if SHARED:
        rows_lost = ((i < n) & _loses_digits(l_i)).to(tl.int32)
        tl.store(far + place, tl.maximum(tl.max(lost, 0), tl.max(rows_lost, 0)))


@triton.jit
def _halves(x):
    """[N, M] -> [N / 2, M]: sums of pairs of rows held by one thread, which in a product are eight rows apart."""
    return tl.sum(x.reshape((x.shape[0] // 16, 2, 8, x.shape[1])), 1).reshape((x.shape[0] // 2, x.shape[1]))


@triton.jit
def _exp(x):
    """tl.exp with subnormal results flushed to 0, which saves three instructions."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _loses_digits(total):
    # Also for NaN.
    return (total >= SMALLEST) & (total <= LARGEST) == 0


@triton.jit
def _by_logit(
    tile, scales, t, x_inverse, row_terms, row_terms_stride, column_terms, terms, own_weight, i, j, n, N, offset, first_row, first_column,
    SIGMOID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d loss / d z, 0 outside. scales [terms]: the scale, once per term."""
    has_own = (first_column < first_row + offset + BLOCK_M) & (first_column + BLOCK_N > first_row + offset)
    own_column = tl.where(i < n, i + offset, -1)[None, :]
    if SIGMOID:
        # 1 - sigmoid(z) as sigmoid(-z), without cancellation.
        z = (_logits(tile, tl.load(scales), x_inverse, i, n) + t) + _outside(j, N)[:, None]
        if has_own:
            z = tl.where(own_column == j[:, None], -z, z)
        g = sigmoid(z) * own_weight
        if has_own:
            g = tl.where(own_column == j[:, None], -g, g)
    else:
        g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # Logits are recomputed for each term, and so from what the loop reads: kept along with products and gradients they would take too many registers.
        for term in tl.range(0, terms, num_stages=1, disable_licm=True):
            row = row_terms + 2 * term * row_terms_stride + i
            column = column_terms + 2 * term * N + j
            s = tl.load(scales + term)
            # 0 s: rounds the product, as the forward does.
            z = tile * (s * tl.load(x_inverse + i, mask=i < n, other=0.0))[None, :] + 0.0 * s
            row_shift = tl.load(row, mask=i < n, other=float("inf"))
            column_shift = tl.load(column, mask=j < N, other=float("inf"))
            by_row = tl.load(row + row_terms_stride, mask=i < n, other=0.0)
            by_column = tl.load(column + N, mask=j < N, other=0.0)
            g += _exp(z - (row_shift[None, :] + column_shift[:, None])) * (by_row[None, :] + by_column[:, None])
        if has_own:
            g -= tl.where(own_column == j[:, None], own_weight, 0.0)
    return g


@triton.jit
def store_total(pointer, tile):
    """The sum, in float64 since terms cancel. As a row of a matrix: Triton 3.6 does not compile sums of a tile's sums for Blackwell."""
    total = tl.sum(tl.sum(tile, 1).to(tl.float64).reshape((1, tile.shape[0])), 1)
    tl.store(pointer + tl.arange(0, 1), total)


@kernel
def contrastive_gradients(
    x,
    y,
    products,
    x_inverse,
    y_inverse,
    x_norm,
    y_norm,
    bias,
    row_terms,
    column_terms,
    facts,
    gradients,
    row_error,
    column_error,
    sums,
    sums_stride,
    x_stride,
    y_stride,
    products_stride,
    gradients_stride,
    row_terms_stride,
    n,
    N,
    width,
    offset,
    GAIN: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOTAL: tl.constexpr,
    CUBLAS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (m, c): one tile of the gradients [n, N], GAIN d loss / d z_ij / (|x_i| |y_j|), in the features' dtype (float32: overwriting the products).

    row_terms [terms, 2, row_terms_stride] and column_terms [terms, 2, N] are the shifts and factors that make up d loss / d z_ij: except for the
    positives' own weight, it is the sum over terms of exp(z_ij - row shift - column shift) (row factor + column factor).

    If the gradients are rounded, their rounding errors are summed: row_error [column tiles, n], weighted by |y_j|, and column_error
    [row tiles, N], weighted by |x_i|. sums [2, sums_stride], float64, a number for each tile: of gradients times (cosine - center), and of gradients (TOTAL).
    facts: see contrastive_terms.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = _products(
        x, y, products, y_inverse, i, j, x_stride, y_stride, products_stride, n, N, width, CUBLAS, BLOCK_M, BLOCK_N, BLOCK_K
    )
    g = _by_logit(
        tile, facts + 4, tl.load(bias) if bias is not None else 0.0, x_inverse, row_terms, row_terms_stride, column_terms, tl.load(facts + 3).to(tl.int32), tl.load(facts + 1), i, j, n, N, offset, tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, SIGMOID, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    by_row = tl.load(x_inverse + i, mask=i < n, other=0.0)[None, :]
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    store_total(sums + place, g * (tile * by_row - tl.load(facts + 2)))
    if TOTAL:
        store_total(sums + sums_stride + place, g)
    if STORE:
        by_column = tl.load(y_inverse + j, mask=j < N, other=0.0)[:, None]
        g = g * by_row * by_column * GAIN
        rounded = g.to(gradients.dtype.element_ty)
        if CUBLAS:
            tl.debug_barrier()  # products may be the same buffer
        pointers = gradients + i[None, :].to(tl.int64) * gradients_stride + j[:, None]
        tl.store(pointers, rounded, mask=(i < n)[None, :] & (j < N)[:, None])
        if gradients.dtype.element_ty != tl.float32:
            lost = g - rounded.to(tl.float32)
            by_column = tl.load(y_norm + j, mask=j < N, other=0.0)[:, None]
            tl.store(row_error + tl.program_id(1).to(tl.int64) * n + i, tl.sum(lost * by_column, 0), mask=i < n)
            by_row = tl.load(x_norm + i, mask=i < n, other=0.0)[None, :]
            tl.store(column_error + tl.program_id(0).to(tl.int64) * N + j, tl.sum(lost * by_row, 1), mask=j < N)
