"""Cross-entropy of a linear head, without the T x V logits kept for the backward.

    z_tv = sum_d h_td w_vd,  lse_t = log sum_v exp(z_tv),  nll_t = lse_t - z_t,y(t), or 0 where y(t) is ignored
    g_tv = d nll_t (exp(z_tv - lse_t) - [v = y(t)]),  d h_td = sum_v g_tv w_vd,  d w_vd = sum_t g_tv h_td

Shapes: hidden h [...,D], weight w [V,D] (nn.Linear's layout), labels y [...] int64, ignored where they equal ignore_index.
Storage float32, bfloat16 or float64 (float16 on GPUs): the matrix products run in it, the softmax and the loss in float32
(float64 for float64). The logits exist in chunks of rows; ignored rows cost nothing.

There are two ways to the gradients. With an upstream gradient per row (reduction "none") hidden, weight, labels and lse are saved,
the last as (max, log of the sum below it): [2,T], and the logits are computed again in the backward. With one for all (reduction
"mean" and "sum"; in float32 and bfloat16) the forward computes the gradients while it has the logits, three matrix
products in all instead of four, and the backward scales them. Those saved are the gradients, then, of the inputs that need one.
Source: Wijmans et al. 2024 (Cut Cross-Entropy, arXiv 2411.09009) for the recomputation; chunks as in Liger Kernel (2410.10989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._contracts import check_labels
from . import _check, _choice, _dispatch, _flops, _operator, cpu
from ._calls import Call

REDUCTIONS = ("mean", "sum", "none")

# Logits are made in tiles of about this many, by shape alone, so that the order of sums never changes. A tile has up to CLASSES classes, or
# more where there are few rows.
CHUNK_LOGITS = 2**21
CLASSES = 1024


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
    op = "linear_cross_entropy"
    _check.tensor(op, "hidden", hidden)
    _check.tensor(op, "weight", weight, ndim=2)
    if hidden.ndim < 2:
        raise ValueError(f"{op}: hidden must have shape [...,D] with at least 2 dimensions, got {tuple(hidden.shape)}")
    hidden, weight = _check.autocast(hidden, weight)
    _check.parameter(op, "weight", weight, (weight.shape[0], hidden.shape[-1]), hidden, "[V,D]")
    _check.tensor(op, "labels", labels, dtypes=(torch.int64,))
    _check.shape(op, "labels", labels, tuple(hidden.shape[:-1]), "like hidden without its last axis")
    _check.same_device(op, "labels", labels, hidden)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    hidden_TD, labels_T = hidden.flatten(0, -2), labels.flatten()
    need_hidden, need_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    # In float16 gradients for an upstream gradient of 1, which no loss scale has raised yet, would underflow.
    at_once = hidden.dtype in (torch.float32, torch.bfloat16)
    if reduction != "none" and at_once and (need_hidden or need_weight):
        return _total(impl, hidden_TD, weight, labels_T, ignore_index, reduction == "mean", need_hidden, need_weight)[0]
    nll = _linear_cross_entropy(impl, hidden_TD, weight, labels_T, ignore_index)[0]
    return _reduce(nll.view(labels.shape), labels, ignore_index, reduction)


def _reduce(nll: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return nll
    if reduction == "sum":
        return nll.sum()
    return nll.sum() / (labels != ignore_index).sum().clamp(min=1)


def mean_factor(counted: int) -> float:
    """What the sum over rows is multiplied by for the mean over `counted` of them."""
    return 1.0 / max(counted, 1)


def count_labels(labels: Tensor, classes: int, ignore_index: int) -> Tensor | None:
    """Positions of the labels that count; None where all do. ValueError as check_labels."""
    if labels.is_cpu and labels.numel() and not 0 <= ignore_index < classes:
        least, largest = (bound.item() for bound in labels.aminmax())
        if least >= 0 and largest < classes:  # one look, as nearly always
            return None
    check_labels(labels, classes, ignore_index)
    counted = labels != ignore_index
    return None if counted.all() else counted.nonzero()[:, 0]


def _counted(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of hidden and labels that count, and their positions (None: all do)."""
    counted = labels != ignore_index
    if counted.all():
        return hidden, labels, None
    rows = counted.nonzero()[:, 0]
    return hidden[rows], labels[rows], rows


def _spread(x: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """Undoes `_counted` along the last axis: zeros where ignored."""
    return x if rows is None else x.new_zeros((*x.shape[:-1], size)).index_copy_(-1, rows, x)


def _tiles(rows: int, classes: int) -> tuple[list[slice], list[slice]]:
    """Slices of rows and of classes, whose rectangles are the tiles."""
    tall = max(1, min(rows, CHUNK_LOGITS // max(1, min(classes, CLASSES))))
    broad = max(1, CHUNK_LOGITS // tall)
    return (
        [slice(start, min(start + tall, rows)) for start in range(0, rows, tall)],
        [slice(start, min(start + broad, classes)) for start in range(0, classes, broad)],
    )


def _is_one_tile(hidden, weight):
    return [len(slices) for slices in _tiles(len(hidden), len(weight))] == [1, 1]


def _forward_eager(hidden, weight, labels, ignore_index):
    # In tiles, where the reference has all T x V logits at once; lse is for the backward.
    check_labels(labels, len(weight), ignore_index)
    wide = _check.accumulate_dtype(hidden.dtype)
    h, y, rows = _counted(hidden, labels, ignore_index)
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
    return _spread(nll, rows, len(hidden)), _spread(lse, rows, len(hidden))


def _inference_eager(hidden, weight, labels, ignore_index):
    """The forward where no backward follows: lse is left out, and what fits in one tile is PyTorch's own."""
    if not _is_one_tile(hidden, weight):
        return _forward_eager(hidden, weight, labels, ignore_index)
    count_labels(labels, len(weight), ignore_index)
    return _specification(hidden, weight, labels, ignore_index)


_forward_eager.inference = _inference_eager  # type: ignore[attr-defined]


def _backward_eager(grad_nll, hidden, weight, labels, lse, ignore_index, need_hidden, need_weight):
    h, y, rows = _counted(hidden, labels, ignore_index)
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


def _fake(hidden, weight, labels, ignore_index):
    wide = _check.accumulate_dtype(hidden.dtype)
    return hidden.new_empty(labels.shape, dtype=wide), hidden.new_empty((2, len(labels)), dtype=wide)


def _fake_backward(grad_nll, hidden, weight, labels, lse, ignore_index, need_hidden, need_weight):
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
    )


def _specification(hidden, weight, labels, ignore_index):
    return (reference(hidden, weight, labels, ignore_index=ignore_index, reduction="none"),)


def _differentiable_backward(grad_nll, hidden, weight, labels, lse, ignore_index, *needs):
    return _operator.gradients(lambda h, w: _specification(h, w, labels, ignore_index)[0], (hidden, weight), grad_nll)


def _save(inputs, output):
    hidden, weight, labels, ignore_index = inputs
    return _operator.Saved((hidden, weight, labels, output[1]), (ignore_index,), constants=(output[1],))


_dispatch.register("linear_cross_entropy", "eager", _forward_eager, _backward_eager)
_linear_cross_entropy = _operator.define(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index) -> (Tensor nll, Tensor lse)",
    fake=_fake,
    specification=_specification,
    save=_save,
    gradients={"hidden": 0, "weight": 1},
    backward_schema="(Tensor grad_nll, Tensor hidden, Tensor weight, Tensor labels, Tensor lse, int ignore_index,"
    " bool need_hidden, bool need_weight) -> (Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
)


# The sum or mean over rows together with its gradients, which are computed for an upstream gradient of 1.


def _differentiable_total(hidden, weight, *_):
    """Where all logits fit in one tile PyTorch keeps them, and its fused softmax costs less than writing the gradients over them."""
    return _total_by_autograd if _is_one_tile(hidden, weight) else None


def _total_by_autograd(hidden, weight, labels, ignore_index, mean, *needs):
    rows = count_labels(labels, len(weight), ignore_index)
    logits = F.linear(hidden, weight).to(_check.accumulate_dtype(hidden.dtype))
    # PyTorch's mean over no rows is nan.
    reduction = "mean" if mean and (len(labels) if rows is None else len(rows)) else "sum"
    return (F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction),)


def _total_eager(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight):
    if _is_one_tile(hidden, weight):
        return _total_of_tile(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight)
    nll, lse = _forward_eager(hidden, weight, labels, ignore_index)
    factor = mean_factor(int((labels != ignore_index).sum())) if mean else 1.0
    grads = _backward_eager(torch.full_like(nll, factor), hidden, weight, labels, lse, ignore_index, need_hidden, need_weight)
    return nll.sum() * factor, *grads


def _total_of_tile(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight):
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


def _scale_eager(grad_loss, grad_hidden, grad_weight):
    return grad_hidden * grad_loss, grad_weight * grad_loss


def _unscaled(grad_loss, grad_hidden, grad_weight):
    """The gradients as they are where the loss is the end of the graph; on a GPU looking would wait for the device."""
    return (grad_hidden, grad_weight) if grad_loss.is_cpu and grad_loss.item() == 1 else None


def _fake_total(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight):
    return (
        hidden.new_empty((), dtype=_check.accumulate_dtype(hidden.dtype)),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
    )


def _specification_total(hidden, weight, labels, ignore_index, mean, *needs):
    return (reference(hidden, weight, labels, ignore_index=ignore_index, reduction="mean" if mean else "sum"),)


def _save_total(inputs, output):
    # Not hidden and weight, which the gradient of a gradient would need: it raises.
    return _operator.Saved(output[1:], without_formula=output[1:])


_dispatch.register("linear_cross_entropy_total", "eager", _total_eager, _scale_eager, differentiable=_differentiable_total)
_total = _operator.define(
    "linear_cross_entropy_total",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, bool mean, bool need_hidden, bool need_weight)"
    " -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight)",
    fake=_fake_total,
    specification=_specification_total,
    save=_save_total,
    gradients={"hidden": 0, "weight": 1},
    backward_schema="(Tensor grad_loss, Tensor grad_hidden, Tensor grad_weight) -> (Tensor, Tensor)",
    backward_fake=lambda grad_loss, grad_hidden, grad_weight: (torch.empty_like(grad_hidden), torch.empty_like(grad_weight)),
    differentiable_backward=_scale_eager,
    backward_shortcut=_unscaled,
)


# ---- its products, for FlopCounterMode


def _flops_forward(hidden, weight, *_):
    return _flops.product(hidden, weight)


def _flops_backward(grad_nll, hidden, weight, labels, lse, ignore_index, need_hidden, need_weight, *_):
    return (1 + need_hidden + need_weight) * _flops.product(hidden, weight)


def _flops_total(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight, *_):
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
    "T* h, int64_t h_stride, T* w, int64_t w_stride, int64_t* labels, int64_t* tokens, double factor, float* nll, T* grad_h, "
    "T* grad_w, int64_t count, int64_t V, int64_t D",
)


def _operands(hidden, weight, labels, ignore_index):
    """hidden, weight and labels as the kernels take them, and the positions of the labels that count. ValueError for one out of range."""
    hidden, weight = cpu.rows(hidden), cpu.rows(weight)
    tokens = count_labels(labels, len(weight), ignore_index)
    return (
        (hidden, hidden.stride(0), weight, weight.stride(0), labels.contiguous()),
        torch.arange(len(labels)) if tokens is None else tokens,
    )


def _gradients(hidden, weight, tokens, need_hidden, need_weight):
    grad_hidden, grad_weight = cpu.empty(hidden, hidden.shape, need_hidden), cpu.empty(weight, weight.shape, need_weight)
    if len(tokens) < len(hidden):
        grad_hidden.zero_()
    return grad_hidden, grad_weight if len(tokens) else grad_weight.zero_()


def _forward_cpu(hidden, weight, labels, ignore_index):
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    room = torch.empty if len(tokens) == len(labels) else torch.zeros
    nll, lse = room(labels.shape, dtype=torch.float32), room((2, len(labels)), dtype=torch.float32)
    _FORWARD(hidden.dtype, *operands, tokens, nll, lse, len(tokens), len(labels), *weight.shape)
    return nll, lse


def _backward_cpu(grad_nll, hidden, weight, labels, lse, ignore_index, need_hidden, need_weight):
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    grad_hidden, grad_weight = _gradients(hidden, weight, tokens, need_hidden, need_weight)
    if len(tokens) and (need_hidden or need_weight):
        _BACKWARD(
            hidden.dtype, *operands, tokens, cpu.wide(grad_nll), cpu.wide(lse),
            cpu.pointer(grad_hidden, need_hidden), cpu.pointer(grad_weight, need_weight), len(tokens), len(labels), *weight.shape,
        )  # fmt: skip
    return grad_hidden, grad_weight


def _total_cpu(hidden, weight, labels, ignore_index, mean, need_hidden, need_weight):
    operands, tokens = _operands(hidden, weight, labels, ignore_index)
    factor = mean_factor(len(tokens)) if mean else 1.0
    nll = (torch.empty if len(tokens) == len(labels) else torch.zeros)(labels.shape, dtype=torch.float32)
    grad_hidden, grad_weight = _gradients(hidden, weight, tokens, need_hidden, need_weight)
    if len(tokens):
        _TOTAL(
            hidden.dtype, *operands, tokens, factor, nll,
            cpu.pointer(grad_hidden, need_hidden), cpu.pointer(grad_weight, need_weight), len(tokens), *weight.shape,
        )  # fmt: skip
    return (nll.sum(dtype=torch.float64) * factor).float(), grad_hidden, grad_weight


for _op, _functions in (("linear_cross_entropy", (_forward_cpu, _backward_cpu)), ("linear_cross_entropy_total", (_total_cpu,))):
    cpu.register(
        _op, *_functions, operands=("hidden", "weight"),
        **_choice.by_evidence(
            _op, "rows, width, classes", lambda hidden, weight: (hidden, None, (_choice.rows(hidden), *weight.shape[::-1])), products="eager"
        ),
    )  # fmt: skip


# ---- how it is called


def _arguments(draw, tokens, width, classes):
    return [draw(tokens, width), draw(classes, width, scale=width**-0.5), torch.arange(tokens) * 7919 % classes]


def _partly_labelled(draw, tokens, width, classes):
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
