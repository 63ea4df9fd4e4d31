"""A stand-in for CUDA graphs on the CPU: operations that PyTorch dispatches during a recording are stored and replayed into the same tensors.

As on a GPU, a replay reads the recorded memory and writes where the recording wrote; recording itself computes nothing, and reading a value
in Python during it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ov3fast import _graphs
from ov3fast.ops import _choice, _dispatch

HOST_READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::masked_select",
)

INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")
"""With a mask they must count its elements first, unless they write a single number."""


class HostReadError(RuntimeError):
    """A value was read during graph recording."""


class Tape(TorchDispatchMode):
    """Records the calls within the block; `replay` repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.reads = False
        """Whether values may currently be read."""
        self.own: set[int] = set()
        """Addresses of tensors created during the recording."""
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """Address -> the modified tensor, and a copy of its original value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        masks = name in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in HOST_READS or (masks and (name == "aten::index" or args[2].ndim)):
            raise HostReadError(f"{function} within a recording")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for changed in tree_leaves(value):
                    whole = changed.detach()
                    if (place := whole.untyped_storage().data_ptr()) not in self.own and place not in self.before:
                        bytes_of = torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage())
                        self.before[place] = bytes_of, bytes_of.clone()
        with self._trusted(function.namespace == "ov3fast"):
            results = function(*args, **kwargs)
        # Views and in-place results share memory with their source, which the replay writes.
        fresh = [] if any(r.alias_info is not None for r in function._schema.returns) else tree_leaves(results)
        # Detached from the returned tensors, which may later be changed (.data, resize_).
        keep = [value.detach() if isinstance(value, Tensor) else None for value in fresh]
        self.own |= {value.untyped_storage().data_ptr() for value in keep if value is not None}
        args, kwargs = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
        self.calls.append((function, args, kwargs, keep))
        return results

    @torch.no_grad()
    def undo(self) -> None:
        """Restores the state before the recording."""
        for _, _, _, places in self.calls:
            for place in places:
                if place is not None and place.is_floating_point():
                    place.fill_(torch.nan)
        for place, was in self.before.values():
            place.copy_(was)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, places in self.calls:
            results = function(*args, **kwargs)
            for place, value in zip(places, tree_leaves(results), strict=False):
                if place is not None and place.data_ptr() != value.data_ptr():
                    place.copy_(value)

    @contextmanager
    def _trusted(self, ours: bool) -> Iterator[None]:
        """Lets our operators' CPU backends read values; the pretended GPU checks that launchers on a GPU don't."""
        before, self.reads = self.reads, ours
        try:
            yield
        finally:
            self.reads = before


class Machine:
    """A log of the stand-in's recordings and replays."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.tapes: list[Tape] = []
        self.pools: list[Any] = []

    @property
    def recordings(self) -> int:
        return len(self.tapes)

    @property
    def replays(self) -> int:
        return self.log.count("replay")


@contextmanager
def our_kernels() -> Iterator[None]:
    """Within the block automatic choices are of the CPU kernels.

    Elsewhere PyTorch's own autograd may be chosen, which a dispatch mode such as the tape's excludes, and its stand-in has other bits.
    """
    with mock.patch.object(_choice, "backend_for", lambda *_: "cpu"):
        _dispatch.forget_choices()
        yield
    _dispatch.forget_choices()


@contextmanager
def graphs_on_cpu() -> Iterator[Machine]:
    """Within the block torch.cuda's graphs, streams and events are the stand-in's, and the CPU is treated as a device that supports them."""
    machine = Machine()

    class Stream:
        def wait_stream(self, other: Any) -> None:
            machine.log.append("wait")

        def wait_event(self, event: Any) -> None:
            machine.log.append("wait")

    class Event:
        def record(self) -> None:
            pass

    class Graph:
        tape: Tape

        def replay(self) -> None:
            machine.log.append("replay")
            self.tape.replay()

    @contextmanager
    def graph(recorded: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        machine.log.append("record")
        machine.pools.append(pool)
        recorded.tape = Tape()
        machine.tapes.append(recorded.tape)
        with ExitStack() as stack:
            for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                stack.enter_context(mock.patch.object(Tensor, name, _refuse(name, recorded.tape)))
            stack.enter_context(recorded.tape)
            yield
        recorded.tape.undo()

    @contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        machine.log.append("side stream")
        yield

    there = {
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": stream,
        "current_stream": lambda device=None: Stream(), "graph_pool_handle": lambda: (len(machine.pools), 0),
        "device": lambda device: nullcontext(),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, value in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(_graphs, "check_device", lambda *_: None))
        stack.enter_context(our_kernels())
        yield machine


def _refuse(name: str, tape: Tape) -> Callable[..., Any]:
    read = getattr(Tensor, name)

    def refuse(*args: Any) -> Any:
        if tape.reads:
            return read(*args)
        raise HostReadError(f"Tensor.{name} within a recording")

    return refuse
