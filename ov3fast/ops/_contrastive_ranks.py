"""The contrastive loss of all ranks, from a backend's functions on rectangles of logits.

A backend computes this rank's rows against some columns. Here these rectangles become the loss and its gradients: texts reach the other
ranks, by an all-gather or round a ring; the rows' and columns' log-sum-exps are merged; the gradients of the texts go back to their owners,
where `project` takes them through the normalisation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import _check, _row_shards

KINDS = ("softmax", "sigmoid")
EXCHANGES = ("gather", "ring")
SMALLEST_NORM = 1e-12

# Tensors that are None in some calls are Any here: columns and own with the sigmoid, gradients that nobody needs.
ForwardRows: TypeAlias = Callable[..., tuple[Tensor, Any, Any]]
"""(image [n,D], text [N,D], scale, bias, kind, offset) -> rows, columns, own; see contrastive_loss._forward_rows."""

BackwardRows: TypeAlias = Callable[..., tuple[Any, Any, Tensor, Tensor]]
"""Gradients by image, by text with its norms held fixed, by s and by t; see contrastive_loss._backward_rows."""


def project(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient by x with its norms held fixed, which may be overwritten -> the gradient by x."""
    wide_x = x.to(grad.dtype)
    norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    a = wide_x / norm
    # Below the smallest norm the divisor is constant.
    return torch.where(norm >= SMALLEST_NORM, grad - a * (a * grad).sum(-1, keepdim=True), grad).to(x.dtype)


def is_alone(arguments: Sequence[Any]) -> bool:
    """Whether a forward or backward with these arguments has no group (the one string that is no kind or exchange), so that nothing travels."""
    return all(argument in (*KINDS, *EXCHANGES, "") for argument in arguments if isinstance(argument, str))


def split_views(image: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """What belongs to each view, of what has a first axis for the views where the image has one."""
    return x.unbind() if image.ndim == 3 else (x,)


def join_views(image: Tensor, parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)) if image.ndim == 3 else parts[0]


def over_views(
    forward_alone: Callable[..., Any], backward_alone: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A backend's kernels for all pairs of one view, (image [N,D], text, scale, bias, kind) -> (loss, r, c), and (grad_loss, image, text, scale,
    bias, r, c, kind, need_image, need_text) -> the gradients -> its forward and backward of the operator without a group."""

    def forward(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, group: str, exchange: str
    ) -> tuple[Tensor, ...]:
        views = [forward_alone(view, text, scale, bias, kind) for view in split_views(image, image)]
        return *(join_views(image, parts) for parts in zip(*views, strict=True)), scale.new_empty(0, dtype=torch.int64)

    def backward(
        grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, r: Tensor, c: Tensor, sizes: Tensor,
        kind: str, group: str, exchange: str, need_image: bool, need_text: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        by_view = zip(*(split_views(image, x) for x in (grad_loss, image, r, c)), strict=True)
        views = [
            backward_alone(g, view, text, scale, bias, r_v, c_v, kind, need_image, need_text) for g, view, r_v, c_v in by_view
        ]
        grad_images, *others = zip(*views, strict=True)
        return (
            join_views(image, grad_images) if need_image else grad_images[0],
            *(functools.reduce(torch.add, grads) for grads in others),
        )

    return forward, backward


def _over_blocks(
    forward_rows: ForwardRows, shards: _row_shards.RowShards, blocks: Iterable[tuple[int, int, Tensor]],
    views: Sequence[Tensor], text: Tensor, scale: Tensor, bias: Tensor | None, kind: str,
) -> Iterator[tuple[Tensor, Any, Any]]:  # fmt: skip
    """`forward_rows` of each view against the columns of all ranks, one rank's after another's: those of the others arrive meanwhile."""
    rows: list[Any] = [None] * len(views)
    own: list[Any] = [None] * len(views)
    columns: list[list[list[Any]]] = [[[scale.new_empty((2, 0))] for _ in shards.sizes] for _ in views]
    for rank, _, block in blocks:
        if rank != shards.rank and len(block) == 0:
            continue
        # Outside this rank's own block there are no pairs: with this offset every row's would lie left of it.
        offset = 0 if rank == shards.rank else -len(text)
        for v, image in enumerate(views):
            part, by_column, block_own = forward_rows(image, block, scale, bias, kind, offset)
            columns[v][rank].append(by_column)
            if rank == shards.rank:
                rows[v], own[v] = part, block_own
            else:
                rows[v] = _add_exponentials(rows[v], part) if kind == "softmax" else rows[v] + part
        del block  # else it would be kept while the one after the next arrives
    by_columns = [None if kind == "sigmoid" else torch.cat([part for parts in ranks for part in parts], 1) for ranks in columns]
    return zip(rows, by_columns, own, strict=True)


def _add_exponentials(a: Tensor, b: Tensor) -> Tensor:
    """Of two sums of exponentials, each as (max, log of the sum below it), the sum."""
    m_i = torch.maximum(a[0], b[0])
    return torch.stack([m_i, torch.logaddexp(a[0] - m_i + a[1], b[0] - m_i + b[1])])


def _loss(rows: Tensor, columns: Any, own: Any, kind: str, share: float, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, rows, columns as (max, log-sum)) from what rows and columns of all pairs come to; the columns' sums are overwritten."""
    if kind == "sigmoid":
        return (rows.sum(dtype=torch.float64) * share).to(wide), rows.new_empty(2, 0), rows.new_empty(2, 0)
    columns[1].log_()
    losses = (rows[0] - own) + rows[1] + (columns[0] - own) + columns[1]
    return (losses.sum(dtype=torch.float64) * (share / 2)).to(wide), rows, columns


def over_ranks(
    forward_rows: ForwardRows, backward_rows: BackwardRows, project: Callable[[Tensor, Tensor], Tensor] = project
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A backend's functions on rectangles -> its forward and backward of the operator, ranks and normalisation included."""

    def forward(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, kind: str, group: str, exchange: str
    ) -> tuple[Tensor, ...]:
        wide = _check.accumulate_dtype(image.dtype)
        if not group and image.ndim == 2:  # all pairs are here, and nothing travels
            rows, columns, own = forward_rows(image, text, scale.to(wide), None if bias is None else bias.to(wide), kind, 0)
            return *_loss(rows, columns, own, kind, 1 / max(len(text), 1), wide), scale.new_empty(0, dtype=torch.int64)
        views = split_views(image, image)
        facts = {
            "the width of image": image.shape[-1], "kind": KINDS.index(kind), "the dtype's size": image.element_size(),
            "the number of views": len(views), "exchange": EXCHANGES.index(exchange),
        }  # fmt: skip
        shards = _row_shards.deal("contrastive_loss", group, len(text), facts, image.device)
        share = shards.world / max(shards.total, 1)
        scale, bias = scale.to(wide), None if bias is None else bias.to(wide)
        found = []
        blocks: Iterable[tuple[int, int, Tensor]]
        blocks = shards.ring(text) if exchange == "ring" else ((rank, 0, block) for rank, block in shards.exchange(text))
        for rows, columns, own in _over_blocks(forward_rows, shards, blocks, views, text, scale, bias, kind):
            if kind == "softmax":
                columns = torch.stack([shards.own(x) for x in shards.merge(*columns)])
            found.append(_loss(rows, columns, own, kind, share, wide))
        # A CPU tensor would keep Inductor from capturing CUDA graphs; alone, a rank knows its size.
        sizes = torch.tensor(shards.sizes) if group else scale.new_empty(0, dtype=torch.int64)
        return *(join_views(image, parts) for parts in zip(*found, strict=True)), sizes

    def backward(
        grad_loss: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, r: Tensor, c: Tensor, sizes: Tensor,
        kind: str, group: str, exchange: str, need_image: bool, need_text: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wide = _check.accumulate_dtype(image.dtype)
        wide_scale, wide_bias = scale.to(wide), None if bias is None else bias.to(wide)
        if not group and image.ndim == 2 and exchange != "ring":
            weight = grad_loss.to(wide) * (1 / max(len(text), 1))
            all_c, all_weights = (c.unbind(), weight.expand(len(text))) if kind == "softmax" else (None, None)
            grad_image, grad_b, grad_scale, grad_bias = backward_rows(
                image, text, wide_scale, wide_bias, kind, 0, r, all_c, weight, all_weights, need_image, need_text
            )
            return (
                grad_image if need_image else image.new_empty(0),
                project(grad_b, text) if need_text else text.new_empty(0),
                grad_scale.to(scale.dtype),
                grad_bias.to(scale.dtype if bias is None else bias.dtype),
            )
        resolved = _row_shards.resolve(group) if group else None
        rank, counts = (0, [len(text)]) if resolved is None else (resolved.rank(), sizes.tolist())
        shards = _row_shards.RowShards(resolved, rank, tuple(counts))
        weights = grad_loss.to(wide) * (shards.world / max(shards.total, 1))
        views: list[_View] = []
        for view, weight, rows, columns in zip(*(split_views(image, x) for x in (image, weights, r, c)), strict=True):
            all_columns = None
            if kind == "softmax":
                all_columns = shards.gather(torch.stack([*columns, weight.expand_as(columns[0])], dim=1)).unbind(1)
            views.append(_View(view, weight, rows, all_columns))
        rectangle = functools.partial(_backward_view, backward_rows, wide_scale, wide_bias, kind)
        if exchange == "ring":
            grad_images, grad_b, *by_scalars = _backward_ring(rectangle, shards, views, text, wide, need_image, need_text)
            grad_text = project(grad_b, text) if need_text else None
            grad_scale, grad_bias = by_scalars
        else:
            all_text, found = shards.gather(text), []
            for view in views:
                by_image, by_text, *by_scalars = rectangle(
                    view, view.image, all_text, shards.offset, slice(None), need_image, need_text
                )
                by_text = project(shards.reduce_scatter(by_text), text) if need_text else text.new_empty(0)
                kinds = (scale.dtype, scale.dtype if bias is None else bias.dtype)
                found.append((by_image, by_text, *(grad.to(dtype) for grad, dtype in zip(by_scalars, kinds, strict=True))))
            grad_images, *others = zip(*found, strict=True)
            grad_text, grad_scale, grad_bias = (functools.reduce(torch.add, grads) for grads in others)
        return (
            join_views(image, grad_images) if need_image else image.new_empty(0),
            text.new_empty(0) if grad_text is None else grad_text,
            grad_scale.to(scale.dtype),
            grad_bias.to(scale.dtype if bias is None else bias.dtype),
        )

    return forward, backward


class _View(NamedTuple):
    """What the backward needs of one view."""

    image: Tensor
    weight: Tensor
    rows: Tensor
    columns: Sequence[Tensor] | None
    """softmax: the (max, log-sum) and the weight of every column of all ranks, [N] each."""


def _backward_view(
    backward_rows: BackwardRows, scale: Tensor, bias: Tensor | None, kind: str, view: _View, image: Tensor, text: Tensor,
    offset: int, columns: slice, need_image: bool, need_text: bool, rows: slice = slice(None),
) -> tuple[Any, Any, Tensor, Tensor]:  # fmt: skip
    """`backward_rows` of a view's rows against the texts of the slice `columns` of all ranks' columns."""
    c: list[Tensor] | None = None
    weights: Tensor | None = None
    if view.columns is not None:
        *c, weights = (x[columns] for x in view.columns)
    return backward_rows(
        image, text, scale, bias, kind, offset, view.rows[..., rows], c, view.weight, weights, need_image, need_text
    )


def _backward_ring(
    rectangle: Callable[..., Any], shards: _row_shards.RowShards, views: Sequence[_View], text: Tensor, wide: torch.dtype,
    need_image: bool, need_text: bool,
) -> tuple[Any, Any, Tensor, Tensor]:  # fmt: skip
    """The gradients by each view, by the own texts with their norms held fixed, by s and by t, with the texts passed round.

    A view's gradient is the sum of one part for each rank's texts, so parts are computed from wide features: in 16 bits each would be
    rounded by itself.
    """
    images = [view.image if shards.world == 1 else view.image.to(wide) for view in views]
    starts = [sum(shards.sizes[:rank]) for rank in range(shards.world + 1)]
    grad_images: list[Any] = [None] * len(views)
    grad_scale: Any = 0
    grad_bias: Any = 0
    sums = _row_shards.RingSums(shards, text.new_empty((0, text.shape[1]), dtype=wide))
    for rank, first, block in shards.ring(text):
        if need_text:
            sums.expect(len(block))
        offset = 0 if rank == shards.rank else -len(text)  # as in _over_blocks
        block = block.to(images[0].dtype)
        grad_block: Any = None if len(block) or rank == shards.rank else sums.like
        columns = slice(starts[rank] + first, starts[rank] + first + len(block))
        # Against the others' pieces in chunks of rows, so that a chunk's gradient and the kernel's copies of it stay small.
        size = max(len(text), 1) if rank == shards.rank else 2 * _row_shards.PIECE_ROWS
        for v, (view, image) in enumerate(zip(views, images, strict=True)):
            for start in range(0, max(len(image), 1), size):
                if rank != shards.rank and len(block) == 0:
                    continue
                rows = slice(start, start + size)
                by_image, by_text, by_scale, by_bias = rectangle(
                    view, image[rows], block, offset, columns, need_image, need_text, rows
                )
                if need_image and grad_images[v] is None:
                    grad_images[v] = by_image
                elif need_image:
                    grad_images[v][rows].add_(by_image)
                if need_text:
                    grad_block = by_text if grad_block is None else grad_block.add_(by_text)
                grad_scale, grad_bias = grad_scale + by_scale, grad_bias + by_bias
                del by_image, by_text
        del block
        if need_text:
            sums.add(grad_block)
    if need_image:
        grad_images = [grad.to(view.image.dtype) for grad, view in zip(grad_images, views, strict=True)]
    return grad_images, sums.home() if need_text else None, grad_scale, grad_bias
