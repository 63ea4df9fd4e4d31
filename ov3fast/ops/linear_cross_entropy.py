"""Cross-entropy of a linear head, without the T x V logits kept for the backward.

    z_tv = sum_d h_td w_vd,  lse_t = log sum_v exp(z_tv),  nll_t = lse_t - z_t,y(t), or 0 where y(t) is ignored
    g_tv = d nll_t (exp(z_tv - lse_t) - [v = y(t)]),  d h_td = sum_v g_tv w_vd,  d w_vd = sum_t g_tv h_td

Shapes: hidden h [...,D], weight w [V,D] (nn.Linear's layout), labels y [...] int64, ignored where they equal ignore_index.
Storage float32, bfloat16 or float64 (float16 on GPUs): the matrix products run in it, the softmax and the loss in float32
(float64 for float64). The logits exist in chunks of rows; ignored rows cost nothing.

The gradients are computed in one of two ways. With an upstream gradient per row (reduction "none") hidden, weight, labels and lse are saved,
the last as (max, log of the sum below it): [2,T], and the logits are computed again in the backward. With one for all (reduction
"mean" and "sum"; in float32 and bfloat16) the forward computes the gradients while it has the logits, three matrix
products in all instead of four, and the backward scales them; what is saved then are the gradients of the inputs that need one.
Source: Wijmans et al. 2024 (Cut Cross-Entropy, arXiv 2411.09009) for the recomputation; chunks as in Liger Kernel (2410.10989).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._contracts import check_labels
from . import _check, _choice, _dispatch, _flops, _operator, cpu
from . import _cross_entropy_eager as eager
from ._calls import Call, Draw
from ._labels import count_labels

REDUCTIONS = ("mean", "sum", "none")


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """Plain PyTorch, the specification."""
    logits = F.linear(hidden, weight).to(_check.accumulate_dtype(hidden.dtype)).flatten(0, -2)
    nll = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="none").view(labels.shape)
    return _reduce(nll, labels, ignore_index, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy between hidden @ weight.T and labels.

    hidden [...,D] and weight [V,D] of one dtype, labels [...] int64 in [0, V) or ignore_index. reduction: "mean" over the labels
    that count (0, with gradients 0, where none does; PyTorch's own gives nan), "sum", or "none" for [...] with 0 where ignored.
    Returns float32 (float64 for float64). Casts hidden and weight under torch.autocast. Raises TypeError or ValueError that
    name the argument; on GPUs a label out of range stops the device as PyTorch's does.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    hidden, weight = _check.autocast(hidden, weight)
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):  # else the operator checks them, once per kind of call
        _check_arguments(hidden, weight, labels)
    graph = torch.is_grad_enabled()
    need_hidden, need_weight = graph and hidden.requires_grad, graph and weight.requires_grad
    # In float16 gradients for an upstream gradient of 1, which no loss scale has raised yet, would underflow.
    at_once = hidden.dtype in (torch.float32, torch.bfloat16) or not (need_hidden or need_weight)
    if reduction != "none" and at_once:
        loss: Tensor = _total(impl, hidden, weight, labels, ignore_index, reduction == "mean", need_hidden, need_weight)[0]
        return loss
    hidden_TD, labels_T = hidden, labels
    if hidden.ndim != 2:
        _check_arguments(hidden, weight, labels)
        hidden_TD, labels_T = hidden.flatten(0, -2), labels.flatten()
    nll = _linear_cross_entropy(impl, hidden_TD, weight, labels_T, ignore_index)[0]
    return _reduce(nll.view(labels.shape), labels, ignore_index, reduction)


def _check_arguments(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> None:
    op = "linear_cross_entropy"
    _check.tensor(op, "hidden", hidden)
    _check.tensor(op, "weight", weight, ndim=2)
    if hidden.ndim < 2:
        raise ValueError(f"{op}: hidden must have shape [...,D] with at least 2 dimensions, got {tuple(hidden.shape)}")
    _check.parameter(op, "weight", weight, (weight.shape[0], hidden.shape[-1]), hidden, "[V,D]")
    _check.tensor(op, "labels", labels, dtypes=(torch.int64,))
    _check.shape(op, "labels", labels, tuple(hidden.shape[:-1]), "like hidden without its last axis")
    _check.same_device(op, "labels", labels, hidden)


def _reduce(nll: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return nll
    if reduction == "sum":
        return nll.sum()
    return nll.sum() / (labels != ignore_index).sum().clamp(min=1)


def _fake(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    wide = _check.accumulate_dtype(hidden.dtype)
    return hidden.new_empty(labels.shape, dtype=wide), hidden.new_empty((2, len(labels)), dtype=wide)


def _fake_backward(
    grad_nll: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
    )


def _specification(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    return (reference(hidden, weight, labels, ignore_index=ignore_index, reduction="none"),)


def _differentiable_backward(
    grad_nll: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, *needs: bool
) -> tuple[Tensor, ...]:
    return _operator.gradients(lambda h, w: _specification(h, w, labels, ignore_index)[0], (hidden, weight), grad_nll)


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    hidden, weight, labels, ignore_index = inputs
    return _operator.Saved((hidden, weight, labels, output[1]), (ignore_index,), constants=(output[1],))


_dispatch.register("linear_cross_entropy", "eager", eager.forward, eager.backward)
_linear_cross_entropy = _operator.define(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index) -> (Tensor nll, Tensor lse)",
    fake=_fake,
    check=_check_arguments,
    specification=_specification,
    save=_save,
    gradients={"hidden": 0, "weight": 1},
    backward_schema="(Tensor grad_nll, Tensor hidden, Tensor weight, Tensor labels, Tensor lse, int ignore_index,"
    " bool need_hidden, bool need_weight) -> (Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
)


# The sum or mean over rows together with its gradients, which are computed for an upstream gradient of 1. It takes hidden and labels with any
# leading axes: views of them would cost autograd more host time than the kernels need.


def _unscaled(grad_loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients unscaled where the loss ends the graph (an upstream gradient of 1); not on a GPU, where reading it would synchronise."""
    return (grad_hidden, grad_weight) if grad_loss.is_cpu and grad_loss.item() == 1 else None


def _fake_total(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, ...]:
    return (
        hidden.new_empty((), dtype=_check.accumulate_dtype(hidden.dtype)),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
    )


def _specification_total(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, *needs: bool
) -> tuple[Tensor, ...]:
    return (reference(hidden, weight, labels, ignore_index=ignore_index, reduction="mean" if mean else "sum"),)


def _save_total(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    # Not hidden and weight, which the gradient of a gradient would need: it raises.
    return _operator.Saved(output[1:], without_formula=output[1:])


_dispatch.register("linear_cross_entropy_total", "eager", eager.total, eager.scale, differentiable=eager.differentiable_total)
_total = _operator.define(
    "linear_cross_entropy_total",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, bool mean, bool need_hidden, bool need_weight)"
    " -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight)",
    fake=_fake_total,
    check=_check_arguments,
    specification=_specification_total,
    save=_save_total,
    gradients={"hidden": 0, "weight": 1},
    backward_schema="(Tensor grad_loss, Tensor grad_hidden, Tensor grad_weight) -> (Tensor, Tensor)",
    backward_fake=lambda grad_loss, grad_hidden, grad_weight: (torch.empty_like(grad_hidden), torch.empty_like(grad_weight)),
    differentiable_backward=eager.scale,
    backward_shortcut=_unscaled,
)


# ---- its products, for FlopCounterMode


def _flops_forward(hidden: _flops.Shape, weight: _flops.Shape, *_: Any) -> int:
    return _flops.product(hidden, weight)


def _flops_backward(
    grad_nll: Any, hidden: _flops.Shape, weight: _flops.Shape, labels: Any, lse: Any, ignore_index: int, need_hidden: bool,
    need_weight: bool, *_: Any,
) -> int:  # fmt: skip
    return (1 + need_hidden + need_weight) * _flops.product(hidden, weight)


def _flops_total(
    hidden: _flops.Shape, weight: _flops.Shape, labels: Any, ignore_index: int, mean: Any, need_hidden: bool, need_weight: bool,
    *_: Any,
) -> int:  # fmt: skip
    return (1 + need_hidden + need_weight) * _flops.product(hidden, weight)


_flops.counts("linear_cross_entropy", _flops_forward, _flops_backward)
_flops.counts("linear_cross_entropy_total", _flops_total)


# ---- the CPU kernels, csrc/cpu/linear_cross_entropy.cpp

_FORWARD = cpu.Kernel(
    "linear_cross_entropy_forward",
    "T* h, int64_t h_stride, T* w, int64_t w_stride, int64_t* labels, int64_t* tokens, float* nll, float* lse, "
    "int64_t count, int64_t rows, int64_t V, int64_t D",
)
_BACKWARD = cpu.Kernel(
    "linear_cross_entropy_backward",
    "T* h, int64_t h_stride, T* w, int64_t w_stride, int64_t* labels, int64_t* tokens, float* grad_nll, float* lse, "
    "T* grad_h, T* grad_w, int64_t count, int64_t rows, int64_t V, int64_t D",
)
_TOTAL = cpu.Kernel(
    "linear_cross_entropy_total",
    "T* h, int64_t h_stride, T* w, int64_t w_stride, int64_t* labels, int64_t ignore_index, int64_t mean, float* loss, T* grad_h, "
    "T* grad_w, int64_t rows, int64_t V, int64_t D",
)


def _operands(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[tuple[Any, ...], Tensor]:
    """hidden, weight and labels as the kernels take them, and the positions of the labels that count. ValueError for one out of range."""
    hidden, weight = cpu.rows(hidden), cpu.rows(weight)
    tokens = count_labels(labels, len(weight), ignore_index)
    return (
        (hidden, hidden.stride(0), weight, weight.stride(0), labels.contiguous()),
        torch.arange(len(labels)) if tokens is None else tokens,
    )


def _gradients(hidden: Tensor, weight: Tensor, tokens: Tensor, need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = cpu.empty(hidden, hidden.shape, need_hidden), cpu.empty(weight, weight.shape, need_weight)
    if len(tokens) < len(hidden):
        grad_hidden.zero_()
    return grad_hidden, grad_weight if len(tokens) else grad_weight.zero_()


def _forward_cpu(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    room = torch.empty if len(tokens) == len(labels) else torch.zeros
    nll, lse = room(labels.shape, dtype=torch.float32), room((2, len(labels)), dtype=torch.float32)
    _FORWARD(hidden.dtype, *operands, tokens, nll, lse, len(tokens), len(labels), *weight.shape)
    return nll, lse


def _backward_cpu(
    grad_nll: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    grad_hidden, grad_weight = _gradients(hidden, weight, tokens, need_hidden, need_weight)
    if len(tokens) and (need_hidden or need_weight):
        _BACKWARD(
            hidden.dtype, *operands, tokens, cpu.wide(grad_nll), cpu.wide(lse),
            cpu.pointer(grad_hidden, need_hidden), cpu.pointer(grad_weight, need_weight), len(tokens), len(labels), *weight.shape,
        )  # fmt: skip
    return grad_hidden, grad_weight


def _total_cpu(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, mean: bool, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, ...]:
    loss = cpu.empty(hidden, (), dtype=torch.float32)
    grads = cpu.empty(hidden, hidden.shape, need_hidden), cpu.empty(weight, weight.shape, need_weight)
    hidden, weight = cpu.rows(hidden), cpu.rows(weight)
    try:
        _TOTAL(
            hidden.dtype, hidden, hidden.stride(0), weight, weight.stride(0), labels.contiguous(), ignore_index, mean, loss,
            *map(cpu.pointer, grads, (need_hidden, need_weight)), labels.numel(), *weight.shape,
        )  # fmt: skip
    except cpu.Refused:
        check_labels(labels, len(weight), ignore_index)
        raise
    return loss, *grads


_evidence = {
    op: _choice.by_evidence(
        op, "rows, width, classes", lambda hidden, weight: (hidden, None, (_choice.rows(hidden), *weight.shape[::-1])), products="eager"
    )
    for op in ("linear_cross_entropy", "linear_cross_entropy_total")
}  # fmt: skip


def _faster_total(hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool) -> tuple[str, ...]:
    """Without gradients it is the forward of linear_cross_entropy."""
    op = "linear_cross_entropy_total" if need_hidden or need_weight else "linear_cross_entropy"
    return _evidence[op]["slower_than"](hidden, weight)


cpu.register(
    "linear_cross_entropy", _forward_cpu, _backward_cpu, operands=("hidden", "weight"), **_evidence["linear_cross_entropy"]
)
cpu.register(
    "linear_cross_entropy_total",
    _total_cpu,
    operands=("hidden", "weight", "need_hidden", "need_weight"),
    unsupported_reason=lambda hidden, weight, *_: cpu.unsupported_reason(hidden, weight),
    slower_than=_faster_total,
)


# ---- how it is called


def _arguments(draw: Draw, tokens: int, width: int, classes: int) -> list[Tensor]:
    return [draw(tokens, width), draw(classes, width, scale=width**-0.5), torch.arange(tokens) * 7919 % classes]


def _partly_labelled(draw: Draw, tokens: int, width: int, classes: int) -> list[Tensor]:
    *rest, labels = _arguments(draw, tokens, width, classes)
    labels[1::5] = -100
    return [*rest, labels]


CALLS = [
    Call(
        op, linear_cross_entropy, reference, arguments, label=label,
        apply=lambda f, hidden, weight, labels, reduction=reduction: f(hidden, weight, labels, reduction=reduction),
        least=(4, 3, 5), tiny=(20, 24, 100), real=(2048, 768, 32000), measured=measured,
    )
    for op, reduction in (("linear_cross_entropy", "none"), ("linear_cross_entropy_total", "mean"))
    for arguments, label, measured in ((_partly_labelled, "", ()), (_arguments, "all labelled", ((240, 192, 600), (512, 768, 16000))))
]  # fmt: skip
