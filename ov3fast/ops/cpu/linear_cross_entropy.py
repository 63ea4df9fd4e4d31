"""Lays out linear_cross_entropy's arguments for csrc/cpu/linear_cross_entropy.cpp."""

import torch

from .. import _dispatch
from ..linear_cross_entropy import check_labels, mean_factor
from . import empty, missing, pointer, refuses, rows, run, wide


def _operands(hidden, weight, labels, ignore_index):
    """hidden, weight and labels as the kernels take them, and the positions of the labels that count."""
    hidden, weight = rows(hidden), rows(weight)
    return (
        (hidden, hidden.stride(0), weight, weight.stride(0), labels.contiguous()),
        (labels != ignore_index).nonzero()[:, 0],
    )


def _gradients(hidden, weight, tokens, need_hidden, need_weight):
    grad_hidden, grad_weight = empty(hidden, hidden.shape, need_hidden), empty(weight, weight.shape, need_weight)
    if len(tokens) < len(hidden):
        grad_hidden.zero_()
    return grad_hidden, grad_weight if len(tokens) else grad_weight.zero_()


def _forward(hidden, weight, labels, ignore_index):
    check_labels(labels, len(weight), ignore_index)
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    room = torch.empty if len(tokens) == len(labels) else torch.zeros
    nll, lse = room(labels.shape, dtype=torch.float32), room((2, len(labels)), dtype=torch.float32)
    run("linear_cross_entropy_forward", hidden.dtype, *operands, tokens, nll, lse, len(tokens), len(labels), *weight.shape)
    return nll, lse


def _backward(grad_nll, hidden, weight, labels, lse, ignore_index, need_hidden, need_weight):
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    grad_hidden, grad_weight = _gradients(hidden, weight, tokens, need_hidden, need_weight)
    if len(tokens) and (need_hidden or need_weight):
        run(
            "linear_cross_entropy_backward", hidden.dtype, *operands, tokens, wide(grad_nll), wide(lse),
            pointer(grad_hidden, need_hidden), pointer(grad_weight, need_weight), len(tokens), len(labels), *weight.shape,
        )  # fmt: skip
    return grad_hidden, grad_weight


def _total(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight):
    check_labels(labels, len(weight), ignore_index)
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    factor = mean_factor(len(tokens)) if mean else 1.0
    nll = torch.zeros(labels.shape, dtype=torch.float32)
    grad_hidden, grad_weight = _gradients(hidden, weight, tokens, need_hidden, need_weight)
    if len(tokens):
        run(
            "linear_cross_entropy_total", hidden.dtype, *operands, tokens, factor, nll,
            pointer(grad_hidden, need_hidden), pointer(grad_weight, need_weight), len(tokens), *weight.shape,
        )  # fmt: skip
    return (nll.sum(dtype=torch.float64) * factor).float(), grad_hidden, grad_weight


_dispatch.register(
    "linear_cross_entropy", "cpu", _forward, _backward, missing=missing,
    refuses=lambda hidden, weight, *_: refuses(hidden, weight),
    refuses_backward=lambda grad_nll, hidden, weight, *_: refuses(hidden, weight),
)  # fmt: skip
_dispatch.register(
    "linear_cross_entropy_total", "cpu", _total, missing=missing,
    refuses=lambda hidden, weight, *_: refuses(hidden, weight),
)  # fmt: skip
