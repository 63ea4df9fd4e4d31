"""Lays out linear_cross_entropy's arguments for csrc/cpu/linear_cross_entropy.cpp."""

import torch

from .. import _choice, _dispatch
from ..linear_cross_entropy import check_labels, mean_factor
from . import Kernel, empty, pointer, rows, unavailable_reason, unsupported_reason, wide

FORWARD = Kernel(
    "linear_cross_entropy_forward",
    "T* h, int64_t h_stride, T* w, int64_t w_stride, int64_t* labels, int64_t* tokens, float* nll, float* lse, "
    "int64_t count, int64_t rows, int64_t V, int64_t D",
)
BACKWARD = Kernel(
    "linear_cross_entropy_backward",
    "T* h, int64_t h_stride, T* w, int64_t w_stride, int64_t* labels, int64_t* tokens, float* grad_nll, float* lse, "
    "T* grad_h, T* grad_w, int64_t count, int64_t rows, int64_t V, int64_t D",
)
TOTAL = Kernel(
    "linear_cross_entropy_total",
    "T* h, int64_t h_stride, T* w, int64_t w_stride, int64_t* labels, int64_t* tokens, double factor, float* nll, T* grad_h, "
    "T* grad_w, int64_t count, int64_t V, int64_t D",
)


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
    FORWARD(hidden.dtype, *operands, tokens, nll, lse, len(tokens), len(labels), *weight.shape)
    return nll, lse


def _backward(grad_nll, hidden, weight, labels, lse, ignore_index, need_hidden, need_weight):
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    grad_hidden, grad_weight = _gradients(hidden, weight, tokens, need_hidden, need_weight)
    if len(tokens) and (need_hidden or need_weight):
        BACKWARD(
        hidden.dtype, *operands, tokens, wide(grad_nll), wide(lse),
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
        TOTAL(
        hidden.dtype, *operands, tokens, factor, nll,
            pointer(grad_hidden, need_hidden), pointer(grad_weight, need_weight), len(tokens), *weight.shape,
        )  # fmt: skip
    return (nll.sum(dtype=torch.float64) * factor).float(), grad_hidden, grad_weight


for _op, _functions in (("linear_cross_entropy", (_forward, _backward)), ("linear_cross_entropy_total", (_total,))):
    _dispatch.register(
        _op, "cpu", *_functions, operands=("hidden", "weight"),
        unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason, **_choice.by_evidence(_op),
    )  # fmt: skip
