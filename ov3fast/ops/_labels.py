"""Which rows of a cross-entropy count: those whose label isn't ignore_index. Without the others they are a smaller problem of the same kind."""

from __future__ import annotations

import torch
from torch import Tensor

from .._contracts import check_labels


def mean_factor(counted: int) -> float:
    """What the sum over rows is multiplied by for the mean over `counted` of them."""
    return 1.0 / max(counted, 1)


def mean_factor_of(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> float | Tensor:
    """The same for these labels: a number in `dtype` where they are on a GPU, which the host does not wait for."""
    counted = (labels != ignore_index).sum()
    return mean_factor(int(counted)) if labels.is_cpu else counted.clamp(min=1).to(dtype).reciprocal()


def count_labels(labels: Tensor, classes: int, ignore_index: int) -> Tensor | None:
    """Positions of the labels that count; None where all do. ValueError as check_labels."""
    if labels.is_cpu and labels.numel() and not 0 <= ignore_index < classes:
        least, largest = (bound.item() for bound in labels.aminmax())
        if least >= 0 and largest < classes:  # one look, as nearly always
            return None
    check_labels(labels, classes, ignore_index)
    counted = labels != ignore_index
    return None if counted.all() else counted.nonzero()[:, 0]


def counted_rows(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of hidden and labels that count, and their positions (None: all do)."""
    counted = labels != ignore_index
    if counted.all():
        return hidden, labels, None
    rows = counted.nonzero()[:, 0]
    return hidden[rows], labels[rows], rows


def spread(x: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """Undoes `counted_rows` along the last axis: zeros where ignored."""
    return x if rows is None else x.new_zeros((*x.shape[:-1], size)).index_copy_(-1, rows, x)
