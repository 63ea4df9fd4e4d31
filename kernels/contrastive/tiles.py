"""contrastive_loss, over tiles of pairs: statistics of logits, gradients by logits, the gradient of one side.

Rows i < n of x meet rows j < N of y; the pair of row i is j = i + offset. Out of bounds a logit is -inf: adding 0 or -inf to s <a_i, b_j> masks
it, and rounds the product, fused or not, before anything is subtracted from it. A tile's cosines are x_i y_j times 1/|x_i| and 1/|y_j| in
float32 (or ones, for unit rows), or come from a buffer of cuBLAS products (CUBLAS). All kernels take them in
the same steps of BLOCK_K and multiply in the same order, so that the backward meets the forward's logits to the bit.
"""

import triton
import triton.language as tl

from ..lib.common import dot
from ..lib.launch import kernel


@triton.jit
def _cosines(
    x, y, products, x_inverse, y_inverse, i, j, x_stride, y_stride, products_stride, n, N, width,
    CUBLAS: tl.constexpr, SWAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of rows i and j; 0 outside. SWAPPED: x is the text."""
    by_row = tl.load(x_inverse + i, mask=i < n, other=0.0)[:, None]
    by_column = tl.load(y_inverse + j, mask=j < N, other=0.0)[None, :]
    if CUBLAS:
        pointers = products + i[:, None].to(tl.int64) * products_stride + j[None, :]
        tile = tl.load(pointers, mask=(i < n)[:, None] & (j < N)[None, :], other=0.0)
    else:
        tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_row = x + i[:, None].to(tl.int64) * x_stride
        y_row = y + j[:, None].to(tl.int64) * y_stride
        for start in range(0, width, BLOCK_K):
            d = start + tl.arange(0, BLOCK_K)[None, :]
            a = tl.load(x_row + d, mask=(i < n)[:, None] & (d < width), other=0.0)
            b = tl.load(y_row + d, mask=(j < N)[:, None] & (d < width), other=0.0)
            tile = dot(a, tl.trans(b), tile)
    return tile * by_column * by_row if SWAPPED else tile * by_row * by_column


@triton.jit
def _outside(i, n):
    return tl.where(i < n, 0.0, float("-inf"))


@triton.jit
def _softplus(z):
    # log(1 + e) as 2 artanh(e / (2 + e)), by its series: exact where e is small, and without a logarithm.
    e = tl.exp(-tl.abs(z))
    t = e / (2.0 + e)
    s = t * t
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))))))
    return tl.where(z > 0, z, 0.0) + 2.0 * t * series


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (m, c): rows of tile m against the `segment` tiles of columns from c * segment on.

    softmax: row_parts [segments, 2, row_parts_stride] and column_parts [tiles of rows, 2, N] of (max, sum of exponentials below
    it), and own [n], the logits of the rows' pairs. sigmoid: row_parts [segments, row_parts_stride], sums of softplus.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * segment * BLOCK_N
    end = tl.minimum(first + segment * BLOCK_N, N)
    s = tl.load(scale)
    t = tl.load(bias)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    own_logit = tl.zeros((BLOCK_M,), tl.float32)
    first_own = tl.program_id(0) * BLOCK_M + offset
    own_column = tl.where(i < n, i + offset, -1)
    for start in range(first, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        cosines = _cosines(
            x, y, products, x_inverse, y_inverse, i, j, x_stride, y_stride, products_stride, n, N, width,
            CUBLAS, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        has_own = (start < first_own + BLOCK_M) & (start + BLOCK_N > first_own)
        if SIGMOID:
            z = (s * cosines + t) + _outside(j, N)[None, :]
            if has_own:
                z = tl.where(own_column[:, None] == j[None, :], -z, z)
            l_i += tl.sum(_softplus(z), 1)
        else:
            z = (s * cosines + _outside(i, n)[:, None]) + _outside(j, N)[None, :]
            if has_own:
                own_logit += tl.sum(tl.where(own_column[:, None] == j[None, :], z, 0.0), 1)
            before = m_i
            m_i = tl.maximum(before, tl.max(z, 1))
            l_i = l_i * tl.exp(before - m_i) + tl.sum(tl.exp(z - m_i[:, None]), 1)
            m_j = tl.max(z, 0)
            l_j = tl.sum(tl.exp(z - m_j[None, :]), 0)
            column = column_parts + tl.program_id(0).to(tl.int64) * 2 * N + j
            tl.store(column, m_j, mask=j < N)
            tl.store(column + N, l_j, mask=j < N)
    if SIGMOID:
        tl.store(row_parts + tl.program_id(1).to(tl.int64) * row_parts_stride + i, l_i, mask=i < n)
    else:
        row = row_parts + tl.program_id(1).to(tl.int64) * 2 * row_parts_stride + i
        tl.store(row, m_i, mask=i < n)
        tl.store(row + row_parts_stride, l_i, mask=i < n)
        tl.store(own + i, own_logit, mask=(own_column >= first) & (own_column < end))


@triton.jit
def _by_logit(
    cosines, s, t, row_max, row_factor, column_max, column_factor, own_weight, i, j, n, N, offset, first_row, first_column,
    SIGMOID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d loss / d z, 0 outside."""
    has_own = (first_column < first_row + offset + BLOCK_M) & (first_column + BLOCK_N > first_row + offset)
    own_column = tl.where(i < n, i + offset, -1)[:, None]
    if SIGMOID:
        # 1 - sigmoid(z) = sigmoid(-z) keeps its digits.
        z = ((s * cosines + t) + _outside(i, n)[:, None]) + _outside(j, N)[None, :]
        if has_own:
            z = tl.where(own_column == j[None, :], -z, z)
        e = tl.exp(-tl.abs(z))
        g = tl.where(z < 0, e, 1.0) / (1.0 + e) * own_weight
        if has_own:
            g = tl.where(own_column == j[None, :], -g, g)
        return g
    z = (s * cosines + _outside(i, n)[:, None]) + _outside(j, N)[None, :]
    r = tl.load(row_max + i, mask=i < n, other=0.0)[:, None]
    r_factor = tl.load(row_factor + i, mask=i < n, other=0.0)[:, None]
    c = tl.load(column_max + j, mask=j < N, other=0.0)[None, :]
    c_factor = tl.load(column_factor + j, mask=j < N, other=0.0)[None, :]
    g = tl.exp(z - r) * r_factor + tl.exp(z - c) * c_factor
    if has_own:
        g -= tl.where(own_column == j[None, :], own_weight, 0.0)
    return g


@kernel
def contrastive_gradients(
    x,
    y,
    products,
    x_inverse,
    y_inverse,
    x_norm,
    y_norm,
    scale,
    bias,
    row_max,
    row_factor,
    column_max,
    column_factor,
    own_weight,
    center,
    gradients,
    row_error,
    column_error,
    sums,
    x_stride,
    y_stride,
    products_stride,
    gradients_stride,
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
    """row_factor [n], column_factor [N]: half of the weights of rows and columns, over their sums of exponentials below row_max, column_max.

    Program (m, c): a tile of gradients [n, N], GAIN d loss / d z_ij / (|x_i| |y_j|) in the features' dtype (float32: in place of products).

    Rounded, what that lost: row_error [tiles of columns, n], sums of it times |y_j|, and column_error [tiles of rows, N], times |x_i|.
    sums [2, tiles], float64: of gradients times cosine - center, and of gradients (TOTAL).
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cosines = _cosines(
        x, y, products, x_inverse, y_inverse, i, j, x_stride, y_stride, products_stride, n, N, width,
        CUBLAS, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    g = _by_logit(
        cosines, tl.load(scale), tl.load(bias), row_max, row_factor, column_max, column_factor, tl.load(own_weight), i, j, n, N,
        offset, tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, SIGMOID, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    # Accumulate in float64: terms cancel.
    tl.store(sums + tile, tl.sum(tl.sum(g * (cosines - tl.load(center)), 1).to(tl.float64), 0))
    if TOTAL:
        tl.store(sums + tl.num_programs(0) * tl.num_programs(1) + tile, tl.sum(tl.sum(g, 1).to(tl.float64), 0))
    if STORE:
        by_row = tl.load(x_inverse + i, mask=i < n, other=0.0)[:, None]
        by_column = tl.load(y_inverse + j, mask=j < N, other=0.0)[None, :]
        g = g * by_row * by_column * GAIN
        rounded = g.to(gradients.dtype.element_ty)
        if CUBLAS:
            tl.debug_barrier()  # products may be the same buffer
        pointers = gradients + i[:, None].to(tl.int64) * gradients_stride + j[None, :]
        tl.store(pointers, rounded, mask=(i < n)[:, None] & (j < N)[None, :])
        if gradients.dtype.element_ty != tl.float32:
            lost = g - rounded.to(tl.float32)
            by_column = tl.load(y_norm + j, mask=j < N, other=0.0)[None, :]
            tl.store(row_error + tl.program_id(1).to(tl.int64) * n + i, tl.sum(lost * by_column, 1), mask=i < n)
            by_row = tl.load(x_norm + i, mask=i < n, other=0.0)[:, None]
            tl.store(column_error + tl.program_id(0).to(tl.int64) * N + j, tl.sum(lost * by_row, 0), mask=j < N)


@kernel
def contrastive_side(
    x,
    y,
    x_inverse,
    y_inverse,
    y_norm,
    scale,
    bias,
    row_max,
    row_factor,
    column_max,
    column_factor,
    own_weight,
    center,
    grad,
    row_error,
    sums,
    x_stride,
    y_stride,
    n,
    N,
    width,
    offset,
    GAIN: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOTAL: tl.constexpr,
    SWAPPED: tl.constexpr,
    SCALARS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program m: grad [n, width] of its rows, sum_j GAIN d loss / d z_ij / (|x_i| |y_j|) y_j, gradients rounded to the features' dtype.

    row_error [n]: what rounding lost, times |y_j|. SCALARS: sums [2, programs], float64, of gradients times cosine - center, and of gradients (TOTAL). SWAPPED: x is
    the text and the pair of row i is j = i + offset just the same.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.load(scale)
    t = tl.load(bias)
    own = tl.load(own_weight)
    middle = tl.load(center)
    d = tl.arange(0, BLOCK_D)
    by_row = tl.load(x_inverse + i, mask=i < n, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    error = tl.zeros((BLOCK_M,), tl.float32)
    by_scale = tl.zeros((BLOCK_M,), tl.float64)
    total_gradient = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        cosines = _cosines(
            x, y, x, x_inverse, y_inverse, i, j, x_stride, y_stride, 0, n, N, width,
            False, SWAPPED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        g = _by_logit(
            cosines, s, t, row_max, row_factor, column_max, column_factor, own, i, j, n, N,
            offset, tl.program_id(0) * BLOCK_M, start, SIGMOID, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if SCALARS:
            by_scale += tl.sum(g * (cosines - middle), 1).to(tl.float64)
            if TOTAL:
                total_gradient += tl.sum(g, 1).to(tl.float64)
        if STORE:
            g = g * by_row * tl.load(y_inverse + j, mask=j < N, other=0.0)[None, :] * GAIN
            rounded = g.to(y.dtype.element_ty)
            if y.dtype.element_ty != tl.float32:
                by_column = tl.load(y_norm + j, mask=j < N, other=0.0)[None, :]
                error += tl.sum((g - rounded.to(tl.float32)) * by_column, 1)
            pointers = y + j[:, None].to(tl.int64) * y_stride + d[None, :]
            b = tl.load(pointers, mask=(j < N)[:, None] & (d < width)[None, :], other=0.0)
            acc = dot(rounded, b, acc)
    if STORE:
        pointers = grad + i[:, None].to(tl.int64) * width + d[None, :]
        tl.store(pointers, acc, mask=(i < n)[:, None] & (d < width)[None, :])
        if y.dtype.element_ty != tl.float32:
            tl.store(row_error + i, error, mask=i < n)
    if SCALARS:
        tl.store(sums + tl.program_id(0), tl.sum(by_scale, 0))
        if TOTAL:
            tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(total_gradient, 0))
