"""Sample calls of the operators: at a tiny size for the interpreter (a few programs per launch), and at a real training size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ov3fast import ops, testing
from ov3fast.ops import _calls


class Sample:
    """A call and its expected results."""

    def __init__(
        self,
        call: _calls.Call,
        *,
        label: str = "",
        real: tuple[int, ...] | None = None,
        plain: Callable[..., Any] | None = None,
    ):
        """The name ends in `label`; `real` and `plain` replace the call's size and its reference."""
        self.call, self.op = call, call.op
        self.name = f"{call.name}-{label}" if label else call.name
        self.sizes = {"least": call.least, "tiny": call.tiny, "real": real or call.real}
        self.function = self._of(call.function)
        self.plain = plain or self._of(call.reference)

    def _of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: self.call.apply(function, *arguments)

    def inputs(self, size: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Arguments of the given size ("least", "tiny" or "real") and dtype; the same values each time."""
        seeds = itertools.count()

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return testing.make(*shape, seed=next(seeds), scale=scale)

        return [value.to(device) for value in self.call.make(draw, self.sizes[size], dtype)]

    def leaves(self, inputs: Sequence[Tensor]) -> list[int]:
        """Positions of the arguments that get gradients."""
        return [i for i, v in enumerate(inputs) if v.is_floating_point()] if self.call.differentiable else []

    def results(
        self, inputs: Sequence[Tensor], function: Callable[..., Any] | None = None, upstream: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs, then the gradients of all floating arguments. Repeated calls can share `upstream`, which takes a second to generate at large sizes."""
        leaves = {i: inputs[i].detach().requires_grad_() for i in self.leaves(inputs)}
        outputs = _listed((function or self.function)(*[leaves.get(i, v) for i, v in enumerate(inputs)]))
        if not leaves:
            return outputs
        upstream = upstream_of(outputs) if upstream is None else [u.to(o) for u, o in zip(upstream, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return [*(value.detach() for value in outputs), *grads]

    def upstream(self, inputs: Sequence[Tensor], function: Callable[..., Any] | None = None) -> list[Tensor]:
        """Upstream gradients for the outputs of these arguments."""
        with torch.no_grad():
            return upstream_of(_listed((function or self.function)(*inputs))) if self.call.differentiable else []

    def assert_parity(self, size: str, dtype: torch.dtype, device: str = "cpu") -> None:
        """Asserts that outputs and gradients are within the error budget of ov3fast.testing."""
        narrow = self.inputs(size, dtype, device)
        upstream = self.upstream(narrow, self.plain)
        budget = testing.Budget(lambda values: self.results(values, self.plain, upstream), narrow)
        budget.check(self.results(narrow, upstream=upstream))

    def takes(self, backend: str, dtype: torch.dtype) -> bool:
        """Whether the backend supports this call."""
        return backend in ops.table()[self.op] and dtype not in self.call.refused.get(backend, ())


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Upstream gradients that depend only on the shapes."""
    return [testing.make(*value.shape, seed=77 + n).to(value) for n, value in enumerate(outputs)]


def _listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def in_chunks(sample: Sample) -> Callable[..., Any]:
    """The same call on the eager backend."""

    def call(*arguments: Tensor) -> Any:
        with ops.use("reference"):
            return sample.function(*arguments)

    return call


SAMPLES = [Sample(call) for call in _calls.every()]

# At sizes that the launchers process in several chunks, the last one smaller; compared with the eager backend, which uses chunks too, since the
# plain reference would need all logits at once, in float64.
ACROSS_CHUNKS = [
    Sample(
        sample.call,
        label=str(real[0]),
        real=real,
        plain=in_chunks(sample) if sample.op == "contrastive_loss" else None,
    )
    for sample in SAMPLES
    for op, real in (
        ("contrastive_loss", (16384, 768)),
        ("contrastive_loss", (40000, 768)),
        ("linear_cross_entropy", (5000, 768, 32000)),
        ("linear_cross_entropy_total", (5000, 768, 32000)),
    )
    if sample.op == op and sample.call.label != "all labelled"
]


def with_backend(name: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """The samples whose operator has this backend and that it supports in this dtype."""
    return [sample for sample in SAMPLES if sample.takes(name, dtype)]
