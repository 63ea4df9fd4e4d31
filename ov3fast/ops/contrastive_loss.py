"""Image-text contrastive loss, softmax (CLIP) or sigmoid (SigLIP), without an N x N tensor kept for the backward.

    a_i = x_i / max(||x_i||, 1e-12),  b_j = y_j / max(||y_j||, 1e-12),  z_ij = s <a_i, b_j>  (+ t with the sigmoid)
    softmax: r_i = log sum_j exp(z_ij),  c_j = log sum_i exp(z_ij),  loss = 1/N sum_i [(r_i + c_i) / 2 - z_ii]
    sigmoid: loss = 1/N sum_ij softplus(-m_ij z_ij),  m_ij = 1 where i = j, else -1

    g_ij = d loss / d z_ij:  softmax 1/N [(exp(z_ij - r_i) + exp(z_ij - c_j)) / 2 - [i=j]],  sigmoid 1/N (sigmoid(z_ij) - [i=j])
    d a_i = s sum_j g_ij b_j,  d b_j = s sum_i g_ij a_i,  d s = sum_ij g_ij <a_i, b_j>,  d t = sum_ij g_ij
    d x_i = (d a_i - a_i <a_i, d a_i>) / ||x_i||

Shapes: image x, text y [N,D]; logit_scale s (the multiplier itself, not its logarithm) and logit_bias t scalars. Features in
float32, bfloat16 or float64 (float16 on GPUs), never rounded on the way; all else in float32 (float64 for float64), the loss
too. N = 0 gives 0. Saved for backward: the arguments, and r and c as pairs (max, log of the sum below it), since their sum in
float32 would be off by 4e-6 at a logit of 100. The N x N products exist in chunks of rows, in the forward and again in the
backward.

An image [V,N,D] holds V views of each text's image: the loss is the mean of the views' losses, each against the same texts.

With a process group each rank has its own pairs, in unequal numbers if need be, and computes its rows against all columns.
Its share of the loss, W/N sum_{i on rank} [...], is such that the mean of the W shares is the loss of all pairs, and the
gradients, averaged over ranks as DDP does, are those of that mean. Texts cross the ranks once in each direction, whatever the number
of views. s and t must be equal on all ranks, and either all ranks run the backward or none.
Source: CLIP, arXiv 2103.00020, figure 3; SigLIP, arXiv 2303.15343, equation 2; Inf-CL, arXiv 2410.17243 (blocks and ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.contrastive.config import FEW
from . import _check, _choice, _dispatch, _flops, _operator, _row_shards, cpu
from ._calls import Call, Draw
from ._contrastive_ranks import (
    EXCHANGES,
    KINDS,
    SMALLEST_NORM,
    join_views,
    over_ranks,
    over_views,
    project,
    split_views,
)

# Rows are taken in chunks of about this many logits, by shape alone, so that the order of sums never changes.
CHUNK_LOGITS = 2**20


def reference(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, kind: str = "softmax", logit_bias: Tensor | None = None
) -> Tensor:
    """Plain PyTorch, the specification, in one process."""
    if image.ndim == 3:
        return torch.stack([reference(view, text, logit_scale, kind=kind, logit_bias=logit_bias) for view in image]).mean()
    wide = _check.accumulate_dtype(image.dtype)
    a, b = (F.normalize(x.to(wide), dim=-1, eps=SMALLEST_NORM) for x in (image, text))
    logits = logit_scale.to(wide) * (a @ b.T)
    if len(image) == 0:
        return logits.sum()
    if kind == "softmax":
        target = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    match = 2 * torch.eye(len(image), dtype=wide, device=image.device) - 1
    return -F.logsigmoid(match * (logits + (0 if logit_bias is None else logit_bias.to(wide)))).sum() / len(image)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    kind: str = "softmax",
    logit_bias: Tensor | None = None,
    group: Any = None,
    exchange: str = "gather",
    impl: str | None = None,
) -> Tensor:
    """Contrastive loss of N pairs (image_i, text_i); the features are normalised inside.

    image, text: [N, D], of one dtype: float32, bfloat16 or float64 (float16 on GPUs). Cast under torch.autocast.
    image [V, N, D]: V views of each text's image; the loss is the mean of the views' losses.
    logit_scale: scalar tensor, the multiplier of the cosines itself, not its logarithm.
    kind: "softmax" (CLIP), the mean of both directions' cross-entropies, or "sigmoid" (SigLIP), the sum over all N x N pairs divided by N.
    logit_bias: scalar tensor added to the logits; "sigmoid" only.
    group: a torch.distributed process group over whose ranks the pairs are sharded, in unequal numbers if need be. Every rank's rows are then
        compared with the columns of all ranks, and each rank gets its share of the loss: the mean of the shares over the ranks is the loss of all
        pairs, and gradients averaged over the ranks, as DDP does, are that loss's. logit_scale and logit_bias must be equal on all
        ranks, and all ranks have to run the backward, or none.
    exchange: how texts cross the group's ranks: "gather" brings all of them to every rank, "ring" passes them from rank to rank, in both
        the forward and the backward, so that a rank holds a few pieces of the others' texts at a time. The next piece is in flight while tiles are computed.
    impl: a backend by name; None picks one.

    Returns a scalar: float32 (float64 for float64), under torch.autocast too; 0 for N = 0. All tensors get gradients; memory is linear in N.
    Raises TypeError or ValueError that name the argument. Source: arXiv 2103.00020, figure 3; arXiv 2303.15343, equation 2.
    """
    group_name = _row_shards.name_of("contrastive_loss", group)
    losses: Tensor = _contrastive_loss(
        impl, image, text, _as_scalar(logit_scale), _as_scalar(logit_bias), kind, group_name, exchange
    )[0]
    return losses if image.ndim == 2 else losses.mean()


def _as_scalar(value: Any) -> Any:
    """A tensor of one element without its dimensions."""
    return value.reshape(()) if isinstance(value, Tensor) and value.ndim and value.numel() == 1 else value


def _check_arguments(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, kind: str, group: str, exchange: str
) -> None:
    op = "contrastive_loss"
    _check.tensor(op, "image", image)
    _check.tensor(op, "text", text)
    if image.ndim not in (2, 3) or (image.ndim == 3 and len(image) == 0):
        raise ValueError(f"{op}: image must be [N, D], or [V, N, D] with V >= 1 views, got shape {tuple(image.shape)}")
    _check.parameter(op, "text", text, tuple(image.shape[-2:]), image, "like image")
    if exchange not in EXCHANGES:
        raise ValueError(f"{op}: exchange must be one of {', '.join(EXCHANGES)}; got {exchange!r}")
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "softmax" and logit_bias is not None:
        raise ValueError(f"{op}: logit_bias is for kind='sigmoid': a softmax does not change with it")
    scalars = {"logit_scale": logit_scale} if logit_bias is None else {"logit_scale": logit_scale, "logit_bias": logit_bias}
    for name, value in scalars.items():
        _check.tensor(op, name, value)
        if value.ndim:
            raise ValueError(f"{op}: {name} must be a scalar tensor, got shape {tuple(value.shape)}")
        _check.same_device(op, name, value, image)


# A backend computes a rectangle: this rank's rows i against columns j, where j = i + offset, if present, is the matching text. The
# forward takes one rank's columns at a time, as they arrive; the backward all of them.


def _forward_rows(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, offset: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """image [n,D], text [N,D] -> rows, columns, own.

    softmax: rows [2,n] are r's (max, log-sum), columns [2,N] c's (max, sum) over these rows alone, own [n] is z_ii.
    sigmoid: rows [n] is sum_j softplus(..), the others are None. In chunks, where the reference has all N x N logits at once.
    """
    a, b = _normalise(image), _normalise(text)
    rows = a.new_empty((2, len(a)) if kind == "softmax" else len(a))
    own = a.new_empty(len(a))
    m_i = a.new_full((len(b),), -torch.inf)
    l_i = torch.zeros_like(m_i)
    for chunk, column in _chunks(len(a), len(b), offset):
        z = scale * (a[chunk] @ b.T)
        if kind == "sigmoid":
            z = z if bias is None else z.add_(bias)
            z.diagonal(column).neg_()
            rows[chunk] = -F.logsigmoid(-z).sum(1)
            continue
        pairs = z.diagonal(column)
        own[chunk][: len(pairs)] = pairs
        rows[0, chunk] = z.amax(1)
        rows[1, chunk] = (z - rows[0, chunk, None]).exp_().sum(1).log_()
        before, m_i = m_i, torch.maximum(m_i, z.amax(0))
        l_i = l_i * (before - m_i).exp_() + z.sub_(m_i).exp_().sum(0)
    return (rows, torch.stack([m_i, l_i]), own) if kind == "softmax" else (rows, None, None)


def _backward_rows(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, offset: int, r: Tensor,
    c: Any, row_weight: Tensor, column_weight: Any, need_image: bool, need_text: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients by image [n,D]; by text over these rows [N,D], with its norms held fixed; by s and by t.

    The first two are None unless needed; all but the first are in the wide dtype. `project` turns the second into the gradient by
    text, once the rows of all ranks are added up. softmax: r [2,n] and c [2,N] are the (max, log-sum) of rows and columns. row_weight
    (scalar) and column_weight [N] stand for the loss's 1/N, times the upstream gradient of the row's and column's rank.
    """
    a, b = _normalise(image), _normalise(text)
    grad_a = torch.empty_like(a) if need_image else None
    grad_b = torch.zeros_like(b) if need_text else None
    grad_scale = torch.zeros((), dtype=torch.float64, device=a.device)
    grad_bias = torch.zeros_like(grad_scale)
    for chunk, column in _chunks(len(a), len(b), offset):
        cosine = a[chunk] @ b.T
        z = scale * cosine
        if kind == "softmax":
            g = (z - r[0, chunk, None]).sub_(r[1, chunk, None]).exp_().mul_(row_weight)
            g.add_(z.sub_(c[0]).sub_(c[1]).exp_().mul_(column_weight)).mul_(0.5)
            g.diagonal(column).sub_(row_weight)
        else:
            z = z if bias is None else z.add_(bias)
            z.diagonal(column).neg_()
            g = z.sigmoid_().mul_(row_weight)
            g.diagonal(column).neg_()
            grad_bias += g.sum(1).sum(dtype=torch.float64)
        grad_scale += cosine.mul_(g).sum(1).sum(dtype=torch.float64)
        g.mul_(scale)
        if grad_a is not None:
            torch.mm(g, b, out=grad_a[chunk])
        if grad_b is not None:
            grad_b.addmm_(g.T, a[chunk])
    return (
        None if grad_a is None else project(grad_a / _norm(image), image),
        None if grad_b is None else grad_b / _norm(text),
        grad_scale,
        grad_bias,
    )


def _chunks(rows: int, columns: int, offset: int) -> list[tuple[slice, int]]:
    """Slices of rows, each with the diagonal on which its own pairs lie."""
    size = max(1, CHUNK_LOGITS // max(columns, 1))
    return [(slice(start, min(start + size, rows)), start + offset) for start in range(0, rows, size)]


def _normalise(x: Tensor) -> Tensor:
    return F.normalize(x.to(_check.accumulate_dtype(x.dtype)), dim=-1, eps=SMALLEST_NORM)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.to(_check.accumulate_dtype(x.dtype)), dim=-1, keepdim=True)
    return norm.clamp_min(SMALLEST_NORM)


def _fake(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, group: str, exchange: str
) -> tuple[Tensor, ...]:
    wide = _check.accumulate_dtype(image.dtype)
    views = image.shape[:-2]
    lse = image.new_empty((*views, 2, len(text) if kind == "softmax" else 0), dtype=wide)
    if group:
        sizes = torch.empty(_row_shards.resolve(group).size(), dtype=torch.int64, device="cpu")
    else:
        sizes = image.new_empty(0, dtype=torch.int64)
    return image.new_empty(views, dtype=wide), lse, torch.empty_like(lse), sizes


def _fake_backward(
    grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, r: Tensor, c: Tensor, sizes: Tensor,
    kind: str, group: str, exchange: str, need_image: bool, need_text: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        image.new_empty(image.shape if need_image else 0),
        text.new_empty(text.shape if need_text else 0),
        torch.empty_like(scale),
        torch.empty_like(scale if bias is None else bias),
    )


def _specification(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, group: str, exchange: str
) -> tuple[Tensor, ...]:
    if group:
        raise NotImplementedError(
            "contrastive_loss: with a group there is no forward-mode, batched, nested or second derivative; take it over one rank's pairs"
        )
    losses = [reference(view, text, scale, kind=kind, logit_bias=bias) for view in split_views(image, image)]
    return (join_views(image, losses),)


def _differentiable_backward(
    grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, r: Tensor, c: Tensor, sizes: Tensor,
    kind: str, group: str, exchange: str, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    no_bias = torch.zeros_like(scale) if bias is None else bias
    return _operator.gradients(
        lambda i, t, s, b: _specification(i, t, s, b, kind, group, exchange)[0], (image, text, scale, no_bias), grad_loss
    )


def _save(inputs: Sequence[Any], output: Any) -> _operator.Saved:
    image, text, scale, bias, *settings = inputs
    return _operator.Saved((image, text, scale, bias, *output[1:]), tuple(settings), constants=output[1:])


_dispatch.register("contrastive_loss", "eager", *over_ranks(_forward_rows, _backward_rows))
_contrastive_loss = _operator.define(
    "contrastive_loss",
    "(Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, str kind, str group, str exchange)"
    " -> (Tensor loss, Tensor row_lse, Tensor column_lse, Tensor sizes)",
    fake=_fake,
    check=_check_arguments,
    autocast=("image", "text"),
    specification=_specification,
    save=_save,
    gradients={"image": 0, "text": 1, "logit_scale": 2, "logit_bias": 3},
    backward_schema="(Tensor grad_loss, Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, Tensor row_lse,"
    " Tensor column_lse, Tensor sizes, str kind, str group, str exchange, bool need_image, bool need_text)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward_fake=_fake_backward,
    differentiable_backward=_differentiable_backward,
)


# ---- its products, for FlopCounterMode


def _flops_forward(image: _flops.Shape, text: _flops.Shape, *_: Any) -> int:
    return _flops.product(image, text)


def _flops_backward(
    grad_loss: Any, image: _flops.Shape, text: _flops.Shape, scale: float, bias: Any, r: Any, c: Any, sizes: Any, kind: str,
    group: str, exchange: str, need_image: bool, need_text: bool, *_: Any,
) -> int:  # fmt: skip
    return (1 + need_image + need_text) * _flops.product(image, text)


_flops.counts("contrastive_loss", _flops_forward, _flops_backward)


# ---- the CPU kernels, csrc/cpu/contrastive_loss.cpp

_FORWARD = cpu.Kernel(
    "contrastive_loss_forward",
    "T* x, int64_t x_stride, T* y, int64_t y_stride, float* scale, float* bias, int64_t sigmoid, int64_t offset, "
    "float* rows, float* columns, float* own, int64_t n, int64_t N, int64_t D",
)
_BACKWARD = cpu.Kernel(
    "contrastive_loss_backward",
    "T* x, int64_t x_stride, T* y, int64_t y_stride, float* scale, float* bias, int64_t sigmoid, int64_t offset, float* r, "
    "float* c_max, float* c_log, float* row_weight, float* column_weight, T* grad_x, float* grad_y, double* grad_scale, "
    "double* grad_bias, int64_t n, int64_t N, int64_t D",
)
_FORWARD_ALONE = cpu.Kernel(
    "contrastive_loss_alone_forward",
    "T* x, int64_t x_stride, T* y, int64_t y_stride, float* scale, float* bias, int64_t sigmoid, int64_t wide, float* rows, "
    "float* columns, float* loss, int64_t N, int64_t D",
)
_BACKWARD_ALONE = cpu.Kernel(
    "contrastive_loss_alone_backward",
    "float* grad_loss, T* x, int64_t x_stride, T* y, int64_t y_stride, float* scale, float* bias, int64_t sigmoid, "
    "int64_t wide, float* r, float* c, T* grad_x, T* grad_y, float* grad_scale, float* grad_bias, int64_t N, int64_t D",
)
_PROJECT = cpu.Kernel(
    "contrastive_loss_project",
    "float* grad, T* x, int64_t x_stride, T* out, int64_t R, int64_t D",
)


def _operands(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """image and text as the kernels take them."""
    if image.dtype == torch.bfloat16 and len(text) <= FEW:
        image, text = image.float(), text.float()
    return cpu.rows(image), cpu.rows(text)


def _forward_rows_cpu(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, offset: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    image, text = _operands(image, text)
    softmax = kind == "softmax"
    lse = scale.new_empty((2, len(image)) if softmax else len(image))
    columns, own = (scale.new_empty(2, len(text)), scale.new_empty(len(image))) if softmax else (None, None)
    _FORWARD(
        image.dtype, image, image.stride(0), text, text.stride(0), scale, bias,
        not softmax, offset, lse, columns, own, len(image), *text.shape,
    )  # fmt: skip
    return lse, columns, own


def _backward_rows_cpu(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, offset: int, r: Tensor,
    c: Any, row_weight: Tensor, column_weight: Any, need_image: bool, need_text: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    dtype = image.dtype
    image, text = _operands(image, text)
    c_max, c_log = (None, None) if c is None else map(cpu.wide, c)
    grad_image = torch.empty_like(image, memory_format=torch.contiguous_format) if need_image else None
    grad_text = None
    if need_text:
        # The first rows write it, so there have to be some.
        grad_text = (torch.empty if len(image) else torch.zeros)(text.shape, dtype=torch.float32)
    grad_scale, grad_bias = (torch.empty((), dtype=torch.float64) for _ in range(2))
    _BACKWARD(
        image.dtype, image, image.stride(0), text, text.stride(0), scale, bias,
        kind == "sigmoid", offset, cpu.wide(r), c_max, c_log, row_weight, cpu.wide(column_weight),
        cpu.pointer(grad_image, need_image), cpu.pointer(grad_text, need_text), grad_scale, grad_bias, len(image), *text.shape,
    )  # fmt: skip
    return None if grad_image is None else grad_image.to(dtype), grad_text, grad_scale, grad_bias


def _project_cpu(grad: Tensor, x: Tensor) -> Tensor:
    x_ND = cpu.rows(x)
    # A rank's part of a larger sum would keep all of it alive.
    in_place = x.dtype == grad.dtype and grad.untyped_storage().nbytes() == grad.nbytes
    out = grad if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
    _PROJECT(x.dtype, grad, x_ND, x_ND.stride(0), out, *x.shape)
    return out


_forward_over_ranks, _backward_over_ranks = over_ranks(_forward_rows_cpu, _backward_rows_cpu, _project_cpu)


# All pairs here: one kernel for each direction, since small calls are bound by host time.


def _forward_alone(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, ...]:
    image, text, softmax = cpu.rows(image), cpu.rows(text), kind == "softmax"
    loss = cpu.empty(image, (), dtype=torch.float32)
    rows, columns = (cpu.empty(loss, (2, len(text) if softmax else 0)) for _ in range(2))
    _FORWARD_ALONE(
        image.dtype, image, image.stride(0), text, text.stride(0), cpu.wide(scale), cpu.wide(bias), not softmax, len(text) <= FEW,
        rows, columns, loss, *text.shape,
    )  # fmt: skip
    return loss, rows, columns


def _backward_alone(
    grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, r: Tensor, c: Tensor, kind: str,
    need_image: bool, need_text: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    image, text = cpu.rows(image), cpu.rows(text)
    grads = cpu.empty_like(image, need_image), cpu.empty_like(text, need_text)
    grad_scale, grad_bias = (cpu.empty(image, (), dtype=torch.float32) for _ in range(2))
    _BACKWARD_ALONE(
        image.dtype, cpu.wide(grad_loss), image, image.stride(0), text, text.stride(0), cpu.wide(scale), cpu.wide(bias),
        kind != "softmax", len(text) <= FEW, cpu.wide(r), cpu.wide(c), *map(cpu.pointer, grads, (need_image, need_text)),
        grad_scale, grad_bias, *text.shape,
    )  # fmt: skip
    return *grads, grad_scale.to(scale.dtype), grad_bias.to(scale.dtype if bias is None else bias.dtype)


_forward_here, _backward_here = over_views(_forward_alone, _backward_alone)


def _forward_cpu(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, group: str, exchange: str
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = (_forward_over_ranks if group else _forward_here)(
        image, text, scale, bias, kind, group, exchange
    )
    return found


def _backward_cpu(
    grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, r: Tensor, c: Tensor, sizes: Tensor,
    kind: str, group: str, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    found: tuple[Tensor, ...] = (_backward_over_ranks if group else _backward_here)(
        grad_loss, image, text, scale, bias, r, c, sizes, kind, group, *settings
    )
    return found


cpu.register(
    "contrastive_loss",
    _forward_cpu,
    _backward_cpu,
    operands=("image", "text"),
    plan=False,  # ranks exchange rows within it
    **_choice.by_evidence("contrastive_loss", "pairs, width", lambda image, text: (image, None, tuple(text.shape))),
)


# ---- how it is called


def _features(draw: Draw, pairs: int, width: int) -> list[Tensor]:
    return [draw(pairs, width), draw(pairs, width), torch.tensor(7.0), torch.tensor(-3.0)]


CALLS = [
    Call(
        "contrastive_loss", contrastive_loss, reference, lambda draw, pairs, width: _features(draw, pairs, width)[:3], label="softmax",
        least=(3, 4), tiny=(150, 40), real=(4096, 768), measured=((144, 192), (2048, 768)), single=(2,),
    ),
    Call(
        "contrastive_loss", contrastive_loss, reference, _features, label="sigmoid",
        apply=lambda f, image, text, scale, bias: f(image, text, scale, kind="sigmoid", logit_bias=bias),
        least=(3, 4), tiny=(150, 40), real=(4096, 768), single=(2, 3),
    ),
]  # fmt: skip
