"""linear_cross_entropy: cuBLAS computes the logits of a chunk of rows, and one kernel processes each row.

A chunk's logits are stored in one buffer of CHUNK_BYTES, in the operands' dtype, and overwritten by their gradients:

    statistics (forward):          z -> max, log of the sum relative to it, loss                      reads z once
    gradient (backward):           z -> g = u (exp(z - max - log sum) - [v = y])                      reads and writes z once
    both (gradients in forward):   the same in one launch, one program per row                        reads z twice, the second time from cache

The one-hot is subtracted in float32. Ignored rows stay in the products, since the host can't count them without a synchronisation; their gradients
are zero, and so are their rows of hidden in the product that sums over rows, of which the same launch writes a copy.

Each chunk reads and writes the weight gradient [V,D] in float32, so chunks must not be small: 128 MB are 1360 rows at V = 49408, for which that
traffic (300 MB at D = 768) takes less time than the chunk's three products. A small call's products are linear.py's: one launch each way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._contracts import LABELS_OUT_OF_RANGE, check_labels
from . import linear
from .lib.common import TYPES, cdiv, rounded
from .lib.config import ANY, TABLE, Config, pick
from .lib.launch import kernel
from .lib.products import add_product, room_for_rows
from .lib.rows import as_dtype, empty, rows

# Size classes: none.
TABLE["cross_entropy_rows"] = {
    (ANY, ANY, ANY): Config({"BLOCK_V": 4096}, warps=8, stages=1),
    ("fp32", ANY, ANY): Config({"BLOCK_V": 2048}, warps=8, stages=1),
}
TABLE["cross_entropy_labels"] = {(ANY, ANY, ANY): Config({"BLOCK": 4096}, warps=8, stages=1)}
TABLE["cross_entropy_loss"] = {(ANY, ANY, ANY): Config({"BLOCK": 4096}, warps=8, stages=1)}
TABLE["cross_entropy_scale"] = {(ANY, ANY, ANY): Config({"BLOCK": 4096}, warps=4, stages=1)}

CHUNK_BYTES = 2**27


@kernel
def cross_entropy_labels(labels, factor, fine, tokens, classes, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: whether all labels are classes or ignored; what the sum over rows is multiplied by, 1 or with MEAN 1 / the number of those that count."""
    i = tl.arange(0, BLOCK)
    counted, wrong = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        label = tl.load(labels + start + i, mask=start + i < tokens, other=ignore_index)
        counts = label != ignore_index
        counted += counts.to(tl.int32)
        wrong += (counts & ((label < 0) | (label >= classes))).to(tl.int32)
    if factor is not None:
        rows = tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
        tl.store(factor, tl.div_rn(1.0, rows) if MEAN else 1.0)
    tl.store(fine, (tl.sum(wrong, 0) == 0).to(fine.dtype.element_ty))


@kernel
def cross_entropy_loss(nll, factor, loss, tokens, BLOCK: tl.constexpr):
    """One program: the sum of nll [tokens], in an order that depends only on their number, times the factor."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tokens, BLOCK):
        total += tl.load(nll + start + i, mask=start + i < tokens, other=0.0)
    tl.store(loss, tl.sum(total, 0) * tl.load(factor))


@triton.jit
def _scale_block(grad, scaled, block, count, weight, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(grad + i, mask=i < count, other=0).to(tl.float32)
    tl.store(scaled + i, rounded(value * weight, scaled.dtype.element_ty), mask=i < count)


@kernel
def cross_entropy_scale(
    upstream, first, scaled_first, first_count, second, scaled_second, second_count, first_blocks, BLOCK: tl.constexpr
):
    """A block of one or two (second: None) gradients per program, times the number upstream."""
    block, weight = tl.program_id(0).to(tl.int64), tl.load(upstream).to(tl.float32)
    if block < first_blocks:
        _scale_block(first, scaled_first, block, first_count, weight, BLOCK)
    elif second is not None:
        _scale_block(second, scaled_second, block - first_blocks, second_count, weight, BLOCK)


@kernel
def cross_entropy_rows(
    logits, labels, upstream, nll, lse, hidden, copy, logits_stride, upstream_stride, lse_stride, hidden_stride, classes, width,
    ignore_index, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program t: row t of logits [.., classes].

    With nll [tokens] the statistics are computed, and written to lse [2, tokens] unless it is None; without, lse is read. With upstream [tokens]
    the gradient overwrites the logits. copy [tokens, width]: hidden, with zeros for the rows that are ignored.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counted = label != ignore_index
    z = logits + row * logits_stride
    # The label's logit is a separate load, and its gradient a separate store, so that no logit has to be compared with the label.
    own = tl.load(z + label, mask=counted, other=0.0).to(tl.float32)
    # [lanes, VECTOR]: a lane's logits are 16 bytes in one thread, and each lane keeps its own maximum until the end of the row.
    VECTOR: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK_V // VECTOR
    v = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if nll is not None:
        # Not -inf: lanes past the end of the row would compute -inf - -inf.
        lane_m = tl.full((LANES,), -3.4028234663852886e38, tl.float32)
        lane_l = tl.zeros((LANES,), tl.float32)
        for start in range(0, classes, BLOCK_V):
            part = tl.load(z + start + v, mask=start + v < classes, other=float("-inf")).to(tl.float32)
            before = lane_m
            lane_m = tl.maximum(before, tl.max(part, 1))
            lane_l = lane_l * tl.exp(before - lane_m) + tl.sum(tl.exp(part - lane_m[:, None]), 1)
        m_i = tl.max(lane_m, 0)
        log_sum = tl.log(tl.sum(lane_l * tl.exp(lane_m - m_i), 0))
        tl.store(nll + row, tl.where(counted, (m_i - own) + log_sum, 0.0))
        if lse is not None:
            tl.store(lse + row, tl.where(counted, m_i, 0.0))
            tl.store(lse + lse_stride + row, tl.where(counted, log_sum, 0.0))
    else:
        m_i = tl.load(lse + row)
        log_sum = tl.load(lse + lse_stride + row)
    if upstream is not None:
        weight = tl.load(upstream + row * upstream_stride)
        tl.debug_barrier()  # the label's logit has been read before it is overwritten
        for start in range(0, classes, BLOCK_V):
            inside = start + v < classes
            part = tl.load(z + start + v, mask=inside, other=0.0).to(tl.float32)
            g = tl.where(counted, tl.exp((part - m_i) - log_sum) * weight, 0.0)
            tl.store(z + start + v, g.to(z.dtype.element_ty), mask=inside)
        tl.debug_barrier()
        p = tl.exp((own - m_i) - log_sum)
        tl.store(z + label, ((p - 1.0) * weight).to(z.dtype.element_ty), mask=counted)
    if copy is not None:
        # 0 times a NaN in an ignored row would be NaN.
        kept = tl.where(counted, width, 0)
        for start in range(0, width, BLOCK_V):
            part = tl.load(hidden + row * hidden_stride + start + v, mask=start + v < kept, other=0)
            tl.store(copy + row * width + start + v, part, mask=start + v < width)


def forward(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """hidden [T,D], weight [V,D], labels [T] -> nll [T], lse [2,T]."""
    hidden = rows(hidden).matrix
    _examine(labels, len(weight), ignore_index)
    nll, lse = (empty(hidden, shape, dtype=torch.float32) for shape in (len(hidden), (2, len(hidden))))
    for chunk, z in _logits(hidden, weight):
        _launch(z, labels[chunk], ignore_index, nll=nll[chunk], lse=lse[:, chunk])
    return nll, lse


def backward(
    grad_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T,D] and weight [V,D], from recomputed logits."""

    def gradients(chunk, z, h):
        return _launch(z, labels[chunk], ignore_index, upstream=grad_nll[chunk], lse=lse[:, chunk], hidden=h)

    return _gradients(rows(hidden).matrix, weight, need_hidden, need_weight, gradients)


def total(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [...,D], weight [V,D], labels [...]: the sum or mean over rows, and its gradients for an upstream gradient of 1 if needed."""
    shape, hidden, labels = hidden.shape, rows(hidden).matrix, labels.flatten()
    numbers, loss = (empty(hidden, shape, dtype=torch.float32) for shape in (len(hidden) + 1, ()))
    nll, factor = numbers[:-1], numbers[-1]
    _examine(labels, len(weight), ignore_index, factor, mean)

    def gradients(chunk, z, h):
        return _launch(z, labels[chunk], ignore_index, upstream=factor.expand(len(z)), nll=nll[chunk], hidden=h)

    if need_hidden or need_weight:
        grad_hidden, grad_weight = _gradients(hidden, weight, need_hidden, need_weight, gradients)
    else:
        grad_hidden, grad_weight = empty(hidden, 0), empty(weight, 0)
        for chunk, z in _logits(hidden, weight):
            _launch(z, labels[chunk], ignore_index, nll=nll[chunk])
    cross_entropy_loss[(1,)](nll, factor, loss, len(nll), **pick("cross_entropy_loss", "fp32").options)
    return loss, grad_hidden.view(shape) if need_hidden else grad_hidden, grad_weight


def scale(grad_loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `total` times the one upstream."""
    grads = grad_hidden.contiguous(), grad_weight.contiguous()
    scaled = tuple(empty(grad, grad.shape) for grad in grads)
    present = [(grad, out, grad.numel()) for grad, out in zip(grads, scaled, strict=True) if grad.numel()]
    if present:
        config = pick("cross_entropy_scale", TYPES[grad_hidden.dtype])
        first, second = (*present, (None, None, 0))[:2]
        blocks = [cdiv(count, config.blocks["BLOCK"]) for *_, count in present]
        cross_entropy_scale[(sum(blocks),)](grad_loss, *first, *second, blocks[0], **config.options)
    return scaled


def _examine(labels: Tensor, classes: int, ignore_index: int, factor: Tensor | None = None, mean: bool = False) -> None:
    """Raises as check_labels, and writes what the sum over rows is multiplied by to factor."""
    fine = empty(labels, ())
    config = pick("cross_entropy_labels", "int64")
    cross_entropy_labels[(1,)](
        labels.contiguous(), factor, fine, len(labels), classes, ignore_index, MEAN=mean, **config.options
    )
    _assert_fine(fine, labels, classes, ignore_index)


def _assert_fine(fine: Tensor, labels: Tensor, classes: int, ignore_index: int) -> None:
    if labels.is_cpu:  # the host may look, and name the label
        check_labels(labels, classes, ignore_index)
    else:
        torch._assert_async(fine, LABELS_OUT_OF_RANGE)


def _logits(hidden: Tensor, weight: Tensor):
    """(rows, their logits) per chunk, all in one buffer."""
    if linear.is_small(rows(hidden), len(weight)):
        yield slice(0, len(hidden)), linear.tiled(hidden, weight, None)
        return
    size = max(1, CHUNK_BYTES // (hidden.element_size() * max(len(weight), 1)))
    room = room_for_rows(hidden, min(size, len(hidden)), len(weight), hidden.dtype)
    for start in range(0, len(hidden), size):
        chunk = slice(start, min(start + size, len(hidden)))
        z = room[: chunk.stop - start]
        torch.mm(hidden[chunk], weight.T, out=z)
        yield chunk, z


def _gradients(hidden, weight, need_hidden, need_weight, gradients):
    """Gradients of hidden and weight. gradients(chunk, z, h) overwrites a chunk's logits with theirs; the rows h that count, if h isn't None."""
    small = linear.is_small(rows(hidden), len(weight))
    grad_hidden, grad_weight = empty(hidden, hidden.shape, need_hidden and not small), None
    for chunk, z in _logits(hidden, weight):
        h = gradients(chunk, z, hidden[chunk] if need_weight else None)
        if small:
            x = rows(h if need_weight else hidden)
            return linear.small_gradients(rows(z), x, weight, need_hidden, need_weight, False)[:2]
        if need_hidden:
            torch.mm(z, weight, out=grad_hidden[chunk])
        if need_weight:
            once = len(z) == len(hidden)
            if grad_weight is None:
                grad_weight = empty(weight, weight.shape, dtype=weight.dtype if once else torch.float32)
            add_product(grad_weight, z.T, h, first=chunk.start == 0)
    if grad_weight is None:  # not needed, or of no rows
        grad_weight = empty(weight, weight.shape, need_weight).zero_()
    return grad_hidden, as_dtype(grad_weight, weight.dtype)


def _launch(z, labels, ignore_index, *, upstream=None, nll=None, lse=None, hidden=None):
    """One program per row of z: see cross_entropy_rows. Returns the copy of hidden."""
    copy = None if hidden is None else empty(hidden, hidden.shape)
    config = pick("cross_entropy_rows", TYPES[z.dtype])
    cross_entropy_rows[(len(z),)](
        z, labels.contiguous(), upstream, nll, lse, hidden, copy, z.stride(0), *map(_row_stride, (upstream, lse, hidden)),
        z.shape[1], 0 if copy is None else copy.shape[1], ignore_index, **config.options,
    )  # fmt: skip
    return copy


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
