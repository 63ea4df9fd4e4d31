"""A training step as two CUDA graphs, forward and backward in one, the optimizer's update in the other; between them the losses are checked, as in
any step.

A step is recorded when its shapes come for the second time, and replayed from then on. Steps whose shapes are new, and those that measure the branches'
gradients, run as without capture. Both read their inputs, the step's number, the learning rate and the average's decay from memory of the GPU, so
that a run's bits do not depend on which of its steps were recorded.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ov3fast import _graphs
from ov3fast.ops import _dispatch
from ov3fast.recipes.config import Recipe
from ov3fast.training.distributed import Ranks
from ov3fast.training.optimizer import AdamW
from ov3fast.training.step import MicroBatch, Step

MOST = 4
"""Step shapes whose graphs are kept; the least recently used is evicted."""


def check(recipe: Recipe, ranks: Ranks) -> None:
    """ValueError where a run can't be captured."""
    _graphs.check_device("capture", ranks.device)
    if ranks.group is not None:
        raise ValueError(f"capture: a step is captured in runs of one process, and this one has {ranks.world}")
    if recipe.synchronize_timing:
        raise ValueError("capture: synchronize_timing waits for the GPU within the step; leave one of them out")


@dataclasses.dataclass
class _Recorded:
    """One shape of the step."""

    forward_backward: _graphs.Graph
    gradients: list[tuple[torch.nn.Parameter, Tensor]]
    """Where the graph leaves them."""
    update: _graphs.Graph | None = None


class CapturedStep:
    """A Step, called and updated in the same way."""

    def __init__(self, step: Step, optimizer: AdamW) -> None:
        self.step, self.optimizer = step, optimizer
        optimizer.read_schedule_from(step.ranks.device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._known: OrderedDict[Any, _Recorded | None] = OrderedDict()
        self._current: _Recorded | None = None

    def __call__(
        self, micro_batches: Sequence[MicroBatch], measure: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """As Step's; the losses are overwritten by the next call."""
        inputs = [value for micro_batch in micro_batches for value in _tensors(micro_batch).values()]
        names = tuple(tuple(_tensors(micro_batch)) for micro_batch in micro_batches)
        # A comparison may select another backend.
        key = names, _graphs.signature(inputs), *(_dispatch.request(op, None) for op in ("linear", "adamw_ema_"))
        seen, recorded = key in self._known, self._known.get(key)
        self._known[key] = recorded
        self._known.move_to_end(key)
        if len(self._known) > MOST:
            self._known.popitem(last=False)
        self._current = None
        if measure or not seen:
            return self.step(micro_batches, measure)
        if recorded is None:
            recorded = self._known[key] = self._record(micro_batches, inputs)
        losses = recorded.forward_backward(*inputs)
        for parameter, gradient in recorded.gradients:
            parameter.grad = gradient
        self._current = recorded
        return losses, {}

    def update(self, optimizer: AdamW) -> None:
        """As Step's, from the gradients of the last call."""
        recorded = self._current
        if recorded is None:
            self.step.update(optimizer)
            return
        optimizer.advance()
        if recorded.update is None:
            recorded.update = _graphs.Graph(self._update, [], self._pool, warm_up=0)
        optimizer.grad_norm = recorded.update()

    def autocast(self) -> Any:
        return self.step.autocast()

    def _update(self) -> Tensor:
        self.optimizer.update()
        self.step.model.clamp_logit_scale()
        return self.optimizer.grad_norm

    def _record(self, micro_batches: Sequence[MicroBatch], inputs: list[Tensor]) -> _Recorded:
        def forward_backward(*values: Tensor) -> dict[str, Tensor]:
            left = iter(values)
            # Without gradients the backward pass leaves new ones, which the graph writes each time, and adds nothing to old ones.
            self.optimizer.zero_grad()
            return self.step([_from(micro_batch, left) for micro_batch in micro_batches])[0]

        device = self.step.ranks.device
        graph = _graphs.Graph(forward_backward, [value.to(device) for value in inputs], self._pool)
        gradients = [(p, p.grad) for p in self.optimizer.parameters.values() if p.grad is not None]
        return _Recorded(graph, gradients)


def _tensors(micro_batch: MicroBatch) -> dict[str, Tensor]:
    """What differs from one micro-batch to the next of the same shape."""
    values = {field.name: getattr(micro_batch, field.name) for field in dataclasses.fields(micro_batch)}
    values["caption_share"] = torch.as_tensor(micro_batch.caption_share, dtype=torch.float32)
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _from(micro_batch: MicroBatch, values: Iterator[Tensor]) -> MicroBatch:
    return dataclasses.replace(micro_batch, **dict(zip(_tensors(micro_batch), values, strict=False)))
