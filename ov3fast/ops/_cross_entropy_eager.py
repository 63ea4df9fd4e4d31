"""The eager backend of linear_cross_entropy: PyTorch, with the logits in tiles, where the reference has all T x V of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._contracts import check_labels
from . import _check
from ._labels import count_labels, counted_rows, mean_factor, mean_factor_of, spread

# Logits are made in tiles of about this many, by shape alone, so that the order of sums never changes. A tile has up to CLASSES classes, or
# more where there are few rows.
CHUNK_LOGITS = 2**21
CLASSES = 1024


def _tiles(rows: int, classes: int) -> tuple[list[slice], list[slice]]:
    """Slices of rows and of classes, whose rectangles are the tiles."""
    tall = max(1, min(rows, CHUNK_LOGITS // max(1, min(classes, CLASSES))))
    broad = max(1, CHUNK_LOGITS // tall)
    return (
        [slice(start, min(start + tall, rows)) for start in range(0, rows, tall)],
        [slice(start, min(start + broad, classes)) for start in range(0, classes, broad)],
    )


def _is_one_tile(hidden: Tensor, weight: Tensor) -> bool:
    return [len(slices) for slices in _tiles(hidden.shape[:-1].numel(), len(weight))] == [1, 1]


def forward(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    check_labels(labels, len(weight), ignore_index)
    wide = _check.accumulate_dtype(hidden.dtype)
    h, y, rows = counted_rows(hidden, labels, ignore_index)
    nll, lse = h.new_empty(len(h), dtype=wide), h.new_empty((2, len(h)), dtype=wide)
    chunks, blocks = _tiles(len(h), len(weight))
    for chunk in chunks:
        m_i, l_i, own = nll.new_full((len(h[chunk]),), -torch.inf), nll.new_zeros(()), nll[chunk]
        for block in blocks:
            z = (h[chunk] @ weight[block].T).to(wide)
            label = y[chunk, None] - block.start
            value = z.gather(1, label.clamp(0, z.shape[1] - 1))
            own.copy_(torch.where((label >= 0) & (label < z.shape[1]), value, own[:, None])[:, 0])
            before, m_i = m_i, torch.maximum(m_i, z.amax(1))
            l_i = l_i * (before - m_i).exp_() + z.sub_(m_i[:, None]).exp_().sum(1)
        log_sum = l_i.log_()
        lse[0, chunk], lse[1, chunk] = m_i, log_sum
        nll[chunk] = (m_i - own) + log_sum
    return spread(nll, rows, len(hidden)), spread(lse, rows, len(hidden))


def inference(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """The forward where no backward follows: lse is left out, and what fits in one tile is PyTorch's own."""
    if not _is_one_tile(hidden, weight):
        return forward(hidden, weight, labels, ignore_index)
    return (_own_loss(hidden, weight, labels, ignore_index, "none"),)


forward.inference = inference  # type: ignore[attr-defined]


def backward(
    grad_nll: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h, y, rows = counted_rows(hidden, labels, ignore_index)
    if rows is not None:
        grad_nll, lse = grad_nll[rows], lse[:, rows]
    chunks, blocks = _tiles(len(h), len(weight))
    # Classes outside, so that of the sums over tiles only those for hidden are kept in the wide dtype.
    grad_h = h.new_zeros(h.shape, dtype=lse.dtype) if need_hidden else None
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    for block in blocks:
        w, grad_w = weight[block], None
        for chunk in chunks:
            z = (h[chunk] @ w.T).to(lse.dtype)
            p = z.sub_(lse[0, chunk, None]).sub_(lse[1, chunk, None]).exp_()
            upstream, label = grad_nll[chunk, None], y[chunk, None] - block.start
            here = (label >= 0) & (label < len(w))
            # The one-hot comes off before the storage dtype rounds p = 1 - small to 1.
            p.mul_(upstream).scatter_add_(1, label.clamp(0, len(w) - 1), torch.where(here, -upstream, 0.0))
            g = p.to(h.dtype)
            if grad_h is not None:
                _add_product(grad_h[chunk], g, w)
            if grad_weight is not None:
                if len(chunks) == 1:
                    torch.mm(g.T, h[chunk], out=grad_weight[block])
                else:
                    grad_w = p.new_zeros(w.shape) if grad_w is None else grad_w
                    _add_product(grad_w, g.T, h[chunk])
        if grad_weight is not None and grad_w is not None:
            grad_weight[block] = grad_w
    if grad_h is not None:
        grad_h = grad_h.to(h.dtype)
        if rows is not None:
            grad_h = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, rows, grad_h)
    return (
        hidden.new_empty(0) if grad_h is None else grad_h,
        weight.new_empty(0) if grad_weight is None else grad_weight,
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be of a wider dtype than the product."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def differentiable_total(hidden: Tensor, weight: Tensor, *_: Any) -> Callable[..., Any] | None:
    """Where all logits fit in one tile PyTorch keeps them, and its fused softmax costs less than writing the gradients over them."""
    return _total_by_autograd if _is_one_tile(hidden, weight) else None


def _total_by_autograd(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, *needs: bool
) -> tuple[Tensor]:
    if mean and not hidden.is_cpu:  # to look at the loss would be to wait for it
        factor = mean_factor_of(labels, ignore_index, _check.accumulate_dtype(hidden.dtype))
        return (_own_loss(hidden, weight, labels, ignore_index, "sum") * factor,)
    loss = _own_loss(hidden, weight, labels, ignore_index, "mean" if mean else "sum")
    # PyTorch's mean over no rows is nan.
    if mean and math.isnan(loss.item()) and not (labels != ignore_index).any():
        loss = _own_loss(hidden, weight, labels, ignore_index, "sum")
    return (loss,)


def _own_loss(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    logits = F.linear(hidden.flatten(0, -2), weight).to(_check.accumulate_dtype(hidden.dtype))
    try:
        return F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction=reduction)
    except IndexError:  # a label out of range: say it as the other backends do
        check_labels(labels, len(weight), ignore_index)
        raise


def total(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    flat = hidden.flatten(0, -2), weight, labels.flatten()
    loss, grad_hidden, grad_weight = _total_of_rows(*flat, ignore_index, mean, need_hidden, need_weight)
    return loss, grad_hidden.view(hidden.shape) if need_hidden else grad_hidden, grad_weight


def _total_of_rows(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if _is_one_tile(hidden, weight):
        if need_hidden or need_weight:
            return _total_of_tile(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight)
        return *_total_by_autograd(hidden, weight, labels, ignore_index, mean), hidden.new_empty(0), weight.new_empty(0)
    nll, lse = forward(hidden, weight, labels, ignore_index)
    factor = mean_factor_of(labels, ignore_index, nll.dtype) if mean else 1.0
    if not (need_hidden or need_weight):
        return nll.sum() * factor, hidden.new_empty(0), weight.new_empty(0)
    grads = backward(torch.ones_like(nll) * factor, hidden, weight, labels, lse, ignore_index, need_hidden, need_weight)
    return nll.sum() * factor, *grads


def _total_of_tile(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of one tile are made once, and the gradients take their place."""
    rows = count_labels(labels, len(weight), ignore_index)
    h, y = (hidden, labels) if rows is None else (hidden[rows], labels[rows])
    logs = (h @ weight.T).to(_check.accumulate_dtype(h.dtype)).log_softmax(1)
    factor = mean_factor(len(h)) if mean else 1.0
    loss = logs.gather(1, y[:, None]).sum() * -factor
    g = logs.exp_().mul_(factor)
    g = g.scatter_add_(1, y[:, None], g.new_full((len(h), 1), -factor)).to(h.dtype)
    grad_h = g @ weight if need_hidden else hidden.new_empty(0)
    if need_hidden and rows is not None:
        grad_h = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, rows, grad_h)
    return loss, grad_h, g.T @ h if need_weight else weight.new_empty(0)


def scale(grad_loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad_hidden * grad_loss, grad_weight * grad_loss
