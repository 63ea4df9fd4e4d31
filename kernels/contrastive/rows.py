"""contrastive_loss, kernels over rows of features: norms and unit rows, merging of partial sums, the last step of the gradient."""

import triton
import triton.language as tl

from ..lib.launch import kernel

SMALLEST_NORM = tl.constexpr(1e-12)


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
    x,
    units,
    norms,
    inverses,
    mean_parts,
    row_stride,
    rows,
    width,
    UNITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """norms, inverses [rows] of x [rows, width]. UNITS: units [rows, width] = x / norm; else mean_parts [programs, width], the
    sum of the unit rows over this program's rows."""
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    norm, _ = clamped_norm(x, row_stride, i, rows, width, BLOCK_R, BLOCK_D)
    inverse = tl.div_rn(tl.full((BLOCK_R,), 1.0, tl.float32), norm)
    tl.store(norms + i, norm, mask=i < rows)
    tl.store(inverses + i, inverse, mask=i < rows)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = load_tile(x, row_stride, i, d, rows, width)
        if UNITS:
            pointers = units + i[:, None].to(tl.int64) * width + d[None, :]
            tl.store(pointers, tl.div_rn(v, norm[:, None] + tl.zeros_like(v)), mask=(i < rows)[:, None] & (d < width)[None, :])
        else:
            part = tl.sum(tl.where((i < rows)[:, None], v * inverse[:, None], 0.0), 0)
            tl.store(mean_parts + tl.program_id(0).to(tl.int64) * width + d, part, mask=d < width)


@kernel
def contrastive_merge(parts, state, count, size, FIRST: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr):
    """Merges parts [count, 2, size] of (max, sum of exponentials relative to it) into state [2, size], which is overwritten if FIRST.

    LOG: stores the logarithm of the sum.
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
    tl.store(state + j, m_i, mask=inside)
    tl.store(state + size + j, tl.log(l_i) if LOG else l_i, mask=inside)


@kernel
def contrastive_project(
    grad,
    x,
    error,
    mean,
    factor,
    row_factor,
    out,
    row_stride,
    rows,
    width,
    COMPLETE: tl.constexpr,
    ROUNDED: tl.constexpr,
    PROJECT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad [rows, width], float32 -> out of the same shape, by blocks of rows.

    COMPLETE: multiplied by factor (a scalar) and row_factor [rows]; with ROUNDED, error [rows] times mean [width] is added first.
    PROJECT: the component along x is removed, since the norm of x varies, unless it is clamped.
    """
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    project_rows(
        grad, x, error, mean, factor, row_factor, out, row_stride, i, rows, width, COMPLETE, ROUNDED, PROJECT, BLOCK_R, BLOCK_D
    )


@triton.jit
def project_rows(
    grad, x, error, mean, factor, row_factor, out, row_stride, i, rows, width,
    COMPLETE: tl.constexpr, ROUNDED: tl.constexpr, PROJECT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inside = i < rows
    times = tl.full((BLOCK_R,), 1.0, tl.float32)
    lost = tl.zeros((BLOCK_R,), tl.float32)
    if COMPLETE:
        times = tl.load(row_factor + i, mask=inside, other=0.0) * tl.load(factor)
    if ROUNDED:
        lost = tl.load(error + i, mask=inside, other=0.0)
    if PROJECT:
        norm, varies = clamped_norm(x, row_stride, i, rows, width, BLOCK_R, BLOCK_D)
        products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            g = _completed(grad, mean, lost, times, i, d, rows, width, ROUNDED)
            # By division, so that the result is exactly 0 for width 1.
            products += g * tl.div_rn(load_tile(x, row_stride, i, d, rows, width), norm[:, None] + tl.zeros_like(g))
        along = tl.where(varies, tl.sum(products, 1), 0.0)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g = _completed(grad, mean, lost, times, i, d, rows, width, ROUNDED)
        if PROJECT:
            g -= tl.div_rn(load_tile(x, row_stride, i, d, rows, width), norm[:, None] + tl.zeros_like(g)) * along[:, None]
        pointers = out + i[:, None].to(tl.int64) * width + d[None, :]
        tl.store(pointers, g.to(out.dtype.element_ty), mask=inside[:, None] & (d < width)[None, :])


@triton.jit
def _completed(grad, mean, lost, times, i, d, rows, width, ROUNDED: tl.constexpr):
    g = load_tile(grad, width, i, d, rows, width)
    if ROUNDED:
        g += lost[:, None] * tl.load(mean + d, mask=d < width, other=0.0)[None, :]
    return g * times[:, None]
