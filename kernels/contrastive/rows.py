"""contrastive_loss, kernels over rows of features and over rows and columns of logits: norms and unit rows, merging of partial sums, the loss, what
the gradients of a tile need of its rows and columns, the last step of the gradients."""

import triton
import triton.language as tl

from ..lib.common import rounded
from ..lib.launch import kernel
from .tiles import shift_of

SMALLEST_NORM = tl.constexpr(1e-12)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def clamped_norm(x, row_stride, i, rows, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Clamped norms of rows i of x, and whether each is unclamped."""
    squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        v = load_tile(x, row_stride, i, start + tl.arange(0, BLOCK_D), rows, width)
        squares += v * v
    return norm_of(squares)


@triton.jit
def norm_of(squares):
    """From the squares of its elements, summed along axis 1: clamped norms, and whether each is unclamped."""
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    # NaN is kept.
    return tl.where(norm < SMALLEST_NORM, SMALLEST_NORM, norm), norm >= SMALLEST_NORM


@triton.jit
def load_tile(x, row_stride, i, d, rows, width):
    """x[i, d] in float32, 0 outside."""
    pointers = x + i[:, None].to(tl.int64) * row_stride + d[None, :]
    return tl.load(pointers, mask=(i < rows)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)


@kernel
def contrastive_features(
    x, x_units, x_norms, x_parts, x_stride, n, y, y_units, y_norms, y_parts, y_stride, N, width,
    UNITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Blocks of the rows of x [n, width], then of y [N, width]. norms [2, rows]: each row's norm and its inverse; parts [blocks, width], where not None:
    the sum of a block's unit rows. UNITS: units [rows, width] = the row / its norm, and norms [3, rows] are ones, ones and the norm's inverse."""
    block, blocks = tl.program_id(0), tl.cdiv(n, BLOCK_R)
    if block < blocks:
        _features(x, x_units, x_norms, x_parts, x_stride, block, n, width, UNITS, BLOCK_R, BLOCK_D)
    else:
        _features(y, y_units, y_norms, y_parts, y_stride, block - blocks, N, width, UNITS, BLOCK_R, BLOCK_D)


@triton.jit
def _features(
    x, units, norms, parts, row_stride, block, rows, width, UNITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    i = block * BLOCK_R + tl.arange(0, BLOCK_R)
    norm, _ = clamped_norm(x, row_stride, i, rows, width, BLOCK_R, BLOCK_D)
    ones = tl.full((BLOCK_R,), 1.0, tl.float32)
    inverse = tl.div_rn(ones, norm)
    tl.store(norms + i, ones if UNITS else norm, mask=i < rows)
    tl.store(norms + rows + i, ones if UNITS else inverse, mask=i < rows)
    if UNITS:
        tl.store(norms + 2 * rows + i, inverse, mask=i < rows)
    if UNITS or parts is not None:
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            v = load_tile(x, row_stride, i, d, rows, width)
            if UNITS:
                pointers = units + i[:, None].to(tl.int64) * width + d[None, :]
                unit = tl.div_rn(v, norm[:, None] + tl.zeros_like(v))
                tl.store(pointers, unit, mask=(i < rows)[:, None] & (d < width)[None, :])
            else:
                part = tl.sum(tl.where((i < rows)[:, None], v * inverse[:, None], 0.0), 0)
                tl.store(parts + block.to(tl.int64) * width + d, part, mask=d < width)


@triton.jit
def _shifted(shift, powers):
    # Fused in either place, so that the same numbers give the same bits.
    return tl.fma(powers, tl.full(powers.shape, LN_2, tl.float32), shift + tl.zeros_like(powers))


@triton.jit
def _split_off_powers(shift, total):
    """(shift, total) -> (shift + k log 2, total / 2^k) with totals in [1/2, 1), whose logarithm loses no precision. `_powers` recovers k."""
    bits = total.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 255
    normal = (exponent > 0) & (exponent < 255)
    mantissa = ((bits & 0x007FFFFF) | (126 << 23)).to(tl.float32, bitcast=True)
    powers = tl.where(normal, exponent - 126, 0).to(tl.float32)
    return _shifted(shift, powers), tl.where(normal, mantissa, total)


@triton.jit
def _powers(shift, shifts):
    """2^-k of the powers split off, and whether `shifts` derive from this shift."""
    powers = tl.floor((shifts - shift) / LN_2 + 0.5)
    near = (_shifted(shift, powers) == shifts) & (tl.abs(powers) < 122)
    k = tl.where(near, powers, 0.0).to(tl.int32)
    return ((127 - k) << 23).to(tl.float32, bitcast=True), near


@kernel
def contrastive_merge(
    parts, state, count, size, FIRST: tl.constexpr, SPLIT: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr
):
    """Merges parts [count, 2, size] of (max, sum of exponentials relative to it) into state [2, size], which is overwritten if FIRST.

    SPLIT: powers of two are split off the sums. LOG: stores the logarithm of the sum.
    """
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < size
    if FIRST:
        m_i = tl.full((BLOCK,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK,), tl.float32)
    else:
        m_i = tl.load(state + j, mask=inside, other=0.0)
        l_i = tl.load(state + size + j, mask=inside, other=0.0)
    part = parts + j
    for _ in range(0, count):
        part_m = tl.load(part, mask=inside, other=0.0)
        part_l = tl.load(part + size, mask=inside, other=0.0)
        before = m_i
        m_i = tl.maximum(before, part_m)
        l_i = l_i * tl.exp(before - m_i) + part_l * tl.exp(part_m - m_i)
        part += 2 * size
    if SPLIT:
        m_i, l_i = _split_off_powers(m_i, l_i)
    tl.store(state + j, m_i, mask=inside)
    tl.store(state + size + j, tl.log(l_i) if LOG else l_i, mask=inside)


@kernel
def contrastive_total(rows, columns, own, loss, count, pairs, SIGMOID: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the loss of all pairs. softmax: of rows [2, pairs], (max, log-sum), columns [2, pairs], (max, sum), whose sums it overwrites by their
    logarithms, and own [pairs]; count = pairs. sigmoid: of rows [count], sums of softplus."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        part = tl.load(rows + i, mask=i < count, other=0.0)
        if not SIGMOID:
            mine = tl.load(own + i, mask=i < count, other=0.0)
            by_row = (part - mine) + tl.load(rows + count + i, mask=i < count, other=0.0)
            log_sum = tl.log(tl.load(columns + count + i, mask=i < count, other=1.0))
            tl.store(columns + count + i, log_sum, mask=i < count)
            part = by_row + (tl.load(columns + i, mask=i < count, other=0.0) - mine) + log_sum
        total += part.to(tl.float64)
    tl.store(loss, (tl.sum(total, 0) / (pairs if SIGMOID else 2 * pairs)).to(tl.float32))


@triton.jit
def _largest_and_nearness(shift, log_max, max_stride, weights, weight_stride, rows, NEAR: tl.constexpr, BLOCK: tl.constexpr):
    """Over all rows: the largest |weight|, if not None, whether a shift does not derive from `shift` (NEAR; else 0), and their sum."""
    largest, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    far = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if weights is not None:
            largest = tl.maximum(largest, tl.abs(tl.load(weights + i * weight_stride, mask=i < rows, other=0.0)))
        shifts = tl.load(log_max + i * max_stride, mask=i < rows, other=0.0)
        total += shifts
        if NEAR:
            _, near = _powers(shift, shifts)
            far |= ((i < rows) & (near == 0)).to(tl.int32)
    return tl.max(largest, 0), tl.max(far, 0), tl.sum(total, 0)


@triton.jit
def _store_terms(
    shift,
    near,
    unit,
    log_max,
    log_sum,
    stride,
    weights,
    weight_stride,
    terms,
    rows,
    block,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    shifts = tl.load(log_max + i * stride, mask=inside, other=0.0)
    weight = 0.5 * (tl.load(weights + i * weight_stride, mask=inside, other=0.0) / unit)
    factor = tl.exp(-tl.load(log_sum + i * stride, mask=inside, other=0.0)) * weight
    powers, _ = _powers(shift, shifts)
    nothing = tl.zeros((BLOCK,), tl.float32)
    first_shift = tl.where(near, shift, shifts) if ROWS else nothing
    first_factor = tl.where(near, factor * powers, factor if ROWS else nothing)
    tl.store(terms + i, first_shift, mask=inside)
    tl.store(terms + rows + i, first_factor, mask=inside)
    tl.store(terms + 2 * rows + i, nothing if ROWS else shifts, mask=inside)
    tl.store(terms + 3 * rows + i, nothing if ROWS else factor, mask=inside)


@triton.jit
def _mean(parts, mean, count, rows, block, width, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, count, BLOCK_P):
        total += load_tile(parts, width, start + tl.arange(0, BLOCK_P), d, count, width)
    tl.store(mean + d, tl.sum(total, 0) / rows, mask=d < width)


@kernel
def contrastive_terms(
    scale, row_weight, column_weights, column_weights_stride, share, r, r_stride, c_max, c_log, c_stride, row_terms, column_terms,
    facts, x_parts, x_mean, x_blocks, y_parts, y_mean, y_blocks, n, N, width,
    SIGMOID: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What contrastive_gradients needs of r [2, n] and c [N], the rows' and columns' (max, log-sum), and of the loss's weights times share: blocks of
    row_terms [2, 2, n] and column_terms [2, 2, N], and facts: the largest |weight|, the rows' weight as a multiple of it, a center of the cosines,
    the number of terms, and the scale twice, once per term. One term if the forward took all exponentials relative to one shift (NEAR: it may
    have), else one for rows and one for columns.
    mean [width], where not None: of the unit rows whose sums over blocks are parts [blocks, width]; by programs of their own, the last ones."""
    block = tl.program_id(0)
    row_blocks = 1 if SIGMOID else tl.cdiv(n, BLOCK)
    column_blocks = 0 if SIGMOID else tl.cdiv(N, BLOCK)
    if block < row_blocks + column_blocks:
        s = tl.load(scale)
        shift = shift_of(s)
        weight = tl.load(row_weight)
        unit, center, far = tl.abs(weight), 0.0 * s, tl.full((), 1, tl.int32)
        if not SIGMOID:
            # By every program: cheaper than a launch of its own.
            _, rows_far, total = _largest_and_nearness(shift, r, 1, None, 0, n, NEAR, BLOCK)
            largest, columns_far, _ = _largest_and_nearness(
                shift, c_max, c_stride, column_weights, column_weights_stride, N, NEAR, BLOCK
            )
            unit = tl.maximum(unit, largest)
            # All pairs' gradients add up to 0. Rounding leaves a residue, which would be weighted by a cosine, mostly that of a row's best
            # column; so something like the mean of those cosines is subtracted first. Shifts are maxima, or far from them.
            center = tl.where(s == 0, center, total / n / s)
            center = tl.where(center > 1, 1.0, tl.where(center < -1, -1.0, center))
            if NEAR:
                far = rows_far | columns_far
        near = far == 0
        unit = tl.where(unit > 0, unit, 1.0)
        if block == 0:
            tl.store(facts, unit * share)
            tl.store(facts + 1, weight / unit)
            tl.store(facts + 2, center)
            tl.store(facts + 3, tl.where(near, 1.0, 2.0))
            tl.store(facts + 4 + tl.arange(0, 2), tl.full((2,), s, tl.float32))
        if not SIGMOID:
            if block < row_blocks:
                _store_terms(shift, near, unit, r, r + r_stride, 1, row_weight, 0, row_terms, n, block, True, BLOCK)
            else:
                _store_terms(
                    shift, near, unit, c_max, c_log, c_stride, column_weights, column_weights_stride, column_terms, N,
                    block - row_blocks, False, BLOCK,
                )  # fmt: skip
    elif x_parts is not None:
        block -= row_blocks + column_blocks
        across = tl.cdiv(width, BLOCK_D)
        if block < across:
            _mean(x_parts, x_mean, x_blocks, n, block, width, BLOCK_P, BLOCK_D)
        else:
            _mean(y_parts, y_mean, y_blocks, N, block - across, width, BLOCK_P, BLOCK_D)


@triton.jit
def _add_parts(parts, total, count, size, block, FIRST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.float32)
    if not FIRST:  # before the sum, whose barrier lies between this and the store
        before = tl.load(total + i, mask=i < size, other=0.0)
    sums = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for start in range(0, count, BLOCK_P):
        sums += load_tile(parts, size, start + tl.arange(0, BLOCK_P), i, count, size)
    tl.store(total + i, before + tl.sum(sums, 0), mask=i < size)


@kernel
def contrastive_errors(
    row_parts, row_error, tiles, n, column_parts, column_error, strips, N,
    FIRST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """row_error [n] = the sums of row_parts [tiles, n]; column_error [N] = those of column_parts [strips, N], added to what is there unless FIRST."""
    block, blocks = tl.program_id(0), tl.cdiv(n, BLOCK)
    if block < blocks:
        _add_parts(row_parts, row_error, tiles, n, block, True, BLOCK_P, BLOCK)
    else:
        _add_parts(column_parts, column_error, strips, N, block - blocks, FIRST, BLOCK_P, BLOCK)


@kernel
def contrastive_project(
    by_x, x, x_error, x_post, x_mean, grad_x, x_stride, n, by_y, y, y_error, y_post, y_mean, grad_y, y_stride, N, width,
    scale, facts, sums, sums_stride, grad_scale, grad_bias,
    GAIN: tl.constexpr, TOTAL: tl.constexpr, BIAS: tl.constexpr, PROJECT_Y: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SUMS: tl.constexpr,
):  # fmt: skip
    """Blocks of grad_x [n, width] from by_x, float32, then of grad_y [N, width] from by_y; None for what is not needed.

    facts: the gradients are multiplied by scale times the first of them over GAIN, and by post [rows]; error [rows] times the other side's mean [width]
    is added before. The component along the row is removed, since its norm varies, unless it is clamped; of y if PROJECT_Y.
    The first program adds up sums [2, sums_stride]: of gradients times cosines, less the third of the facts, and with TOTAL of gradients, which tell
    what was left out and with BIAS are bias's gradient, else 0.
    """
    block = tl.program_id(0) - 1 if sums is not None else tl.program_id(0)
    x_blocks = tl.cdiv(n, BLOCK_R) if grad_x is not None else 0
    factor = 1.0
    if facts is not None:
        factor = tl.load(scale) * tl.load(facts) / GAIN
    if sums is not None and block < 0:
        by_scale, total = _sum(sums, sums_stride, BLOCK_SUMS), 0.0
        if TOTAL:
            total = _sum(sums + sums_stride, sums_stride, BLOCK_SUMS)
        if facts is not None:
            unit = tl.load(facts).to(tl.float64)
            if TOTAL:
                by_scale += tl.load(facts + 2).to(tl.float64) * total
                total *= unit
            by_scale *= unit
        _store_scalar(grad_scale, by_scale)
        _store_scalar(grad_bias, total if BIAS else 0.0)
    elif grad_x is not None and block < x_blocks:
        _project(by_x, x, x_error, y_mean, factor, x_post, grad_x, x_stride, block, n, width, True, BLOCK_R, BLOCK_D)
    elif grad_y is not None:
        _project(
            by_y, y, y_error, x_mean, factor, y_post, grad_y, y_stride, block - x_blocks, N, width, PROJECT_Y, BLOCK_R, BLOCK_D
        )


@triton.jit
def _sum(x, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(x + i, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _store_scalar(pointer, value):
    dtype: tl.constexpr = pointer.dtype.element_ty
    if dtype == tl.float64:
        tl.store(pointer, value)
    else:
        tl.store(pointer, rounded((value + tl.zeros((), tl.float64)).to(tl.float32), dtype))


@triton.jit
def _project(
    grad, x, error, mean, factor, post, out, row_stride, block, rows, width,
    PROJECT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = block * BLOCK_R + tl.arange(0, BLOCK_R)
    times = tl.full((BLOCK_R,), 1.0, tl.float32) * factor
    lost = tl.zeros((BLOCK_R,), tl.float32)
    if post is not None:
        times *= tl.load(post + i, mask=i < rows, other=0.0)
    if error is not None:
        lost = tl.load(error + i, mask=i < rows, other=0.0)
    if PROJECT:
        norm, varies = clamped_norm(x, row_stride, i, rows, width, BLOCK_R, BLOCK_D)
        products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            g = _completed(grad, error, mean, lost, times, i, d, rows, width)
            # By division, so that the result is exactly 0 for width 1.
            products += g * tl.div_rn(load_tile(x, row_stride, i, d, rows, width), norm[:, None] + tl.zeros_like(g))
        along = tl.where(varies, tl.sum(products, 1), 0.0)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = _completed(grad, error, mean, lost, times, i, d, rows, width)
        if PROJECT:
            g -= tl.div_rn(load_tile(x, row_stride, i, d, rows, width), norm[:, None] + tl.zeros_like(g)) * along[:, None]
        pointers = out + i[:, None].to(tl.int64) * width + d[None, :]
        tl.store(pointers, rounded(g, out.dtype.element_ty), mask=(i < rows)[:, None] & (d < width)[None, :])


@triton.jit
def _completed(grad, error, mean, lost, times, i, d, rows, width):
    g = load_tile(grad, width, i, d, rows, width)
    if error is not None:
        g += lost[:, None] * tl.load(mean + d, mask=d < width, other=0.0)[None, :]
    return g * times[:, None]
