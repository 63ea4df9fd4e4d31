"""CUDA graphs: what a function launches, recorded once and replayed by one call, with no Python in between.

A graph holds addresses. It reads buffers of its own, into which the inputs of each call are copied, and writes its results where it wrote them when
it was recorded: the next replay overwrites them. It also holds the addresses of everything else that the function reads, weights above all, which
may change in place and nowhere else. A recorded function must not read a value of a tensor in Python (`.item()`, `.tolist()`, an index by a mask):
there is none yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
"""Calls before the recording: kernels are compiled and loaded then, libraries take their workspaces, caches fill."""


def check_device(what: str, device: torch.device) -> None:
    """ValueError where there are no graphs."""
    if device.type != "cuda":
        raise ValueError(f"{what}: CUDA graphs need a GPU, and this is on {device}")


class Graph:
    """`function(*inputs)` as a graph, for inputs of these shapes and dtypes on the current device.

    pool: torch.cuda.graph_pool_handle(). Graphs of one pool share memory: they must not run at the same time, and what one of them leaves in its
    results stays there while the others run.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], pool: Any, warm_up: int = WARM_UP) -> None:
        self.inputs = [value.detach().clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, which load data, may allocate meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.results = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """The results, which the next call overwrites."""
        with torch.no_grad():
            for buffer, value in zip(self.inputs, inputs, strict=True):
                buffer.copy_(value, non_blocking=True)
        self._graph.replay()
        return self.results


def signature(values: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph is recorded for."""
    return tuple((tuple(value.shape), value.dtype) for value in values)
