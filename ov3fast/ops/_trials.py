"""Which backend is fastest on the operators' calls here: what `ov3fast tune --device cpu` measures."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _calls, _choice, _dispatch
from ._choice import MIXED, Choice

BACKENDS = tuple(
    name for name in _dispatch.PREFERENCE if name not in ("cuda", "triton", "flash_attn_3", "flash_attn", "cudnn", "xformers")
)
"""What an automatic choice can take on a CPU."""

OUT_OF_BOUNDS = {("flash_attention", "eager"): "it keeps N x N numbers"}
"""Backends that an automatic choice never takes."""

PYTORCH = ("sdpa", "eager")
"""Those that are what one would call without ov3fast."""

WITHIN = 0.985
"""Our kernels keep a call unless another backend takes less than this share of their time, so that a tie changes no bits."""

MIXED_WITHIN = 0.9
"""A backward stays with its forward's backend unless with another they take less than this share of the time: the sum of parts that were timed
apart, which leaves out what two backends don't share, such as weights that were converted."""

FAR = 4.0
"""A backend this many times slower than the fastest is timed once."""


class Trial(NamedTuple):
    call: _calls.Call
    dtype: str
    arguments: tuple[int, ...]
    """The call's size."""

    @property
    def operator(self) -> str:
        return self.call.op

    @property
    def size(self) -> tuple[int, ...]:
        """As the choice counts it."""
        return self.call.counted(*self.arguments)


def trials(only: str = "", dtype: str = "") -> Iterator[Trial]:
    """Those whose operator contains `only`, in one dtype or all."""
    for call in _calls.every():
        for kind in (*_choice.DTYPES.values(), *([MIXED] if call.parameters else [])):
            for size in call.measured:
                if only in call.op and dtype in kind:
                    yield Trial(call, kind, size)


def prepare(trial: Trial) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function and its leaves, which all want gradients. Random values, the same each time."""
    activations = torch.float32 if trial.dtype == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale)

    parameters = torch.float32 if trial.dtype == MIXED else activations
    bound = _calls.Bound(trial.call, trial.call.make(draw, trial.arguments, activations, parameters))
    return bound(trial.call.function), bound.leaves


def measure(trial: Trial, budget: float) -> list[Choice]:
    """The choices for its forward and its backward call, from medians of turns for about `budget` seconds each."""
    settle()
    op = trial.operator
    function, leaves = prepare(trial)
    upstream = [torch.ones_like(out) for out in _outputs(function(*leaves))]

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        torch.autograd.grad(_outputs(function(*leaves)), leaves, upstream)

    names = [n for n in BACKENDS if _dispatch.table()[op].get(n) == "ready" and (op, n) not in OUT_OF_BOUNDS]
    total = op == "linear_cross_entropy_total"
    forward_times = medians(both if total else forward, names, budget)
    if total:  # its forward computes the gradients
        return [pick(op, "forward", trial.dtype, trial.size, forward_times)]
    both_times = medians(both, names, budget)
    choice = pick_forward(op, trial.dtype, trial.size, forward_times, both_times)
    first = forward_times[choice.backend]
    after_it = {name: both_times[name] - forward_times[name] + first for name in names}
    return [choice, pick_backward(op, trial.dtype, trial.size, after_it, choice.backend)]


def _outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def settle() -> None:
    """Brings glibc's allocator to where a training process has it.

    Freeing a tensor of almost 32 MB raises its thresholds for good; until then results of some MB are unmapped when they are freed, and
    every call pays for new pages, up to ten times its own time.
    """
    torch.empty(2**23 - 2**12)


def medians(run: Callable[[], object], names: list[str], budget: float) -> dict[str, float]:
    """Seconds of a run on each backend, in turn."""

    def seconds(name: str) -> float:
        with _dispatch.use(name):
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

    for name in names:
        seconds(name)
    once = {name: seconds(name) for name in names}
    near = [name for name in names if once[name] <= FAR * min(once.values())]
    found: dict[str, list[float]] = {name: [once[name]] for name in names}
    began, turns = time.perf_counter(), 0
    while turns < 4 or (time.perf_counter() - began < budget and turns < 40):
        for name in reversed(near) if turns % 2 else near:
            found[name].append(seconds(name))
        turns += 1
    return {name: statistics.median(values) for name, values in found.items()}


def pick(op: str, direction: str, dtype: str, size: tuple[int, ...], times: Mapping[str, float]) -> Choice:
    """The first backend, ours before others, that takes at most the fastest one's time over WITHIN."""
    return _choose(op, direction, dtype, size, times, _first(times))


def pick_forward(op: str, dtype: str, size: tuple[int, ...], forward: Mapping[str, float], both: Mapping[str, float]) -> Choice:
    """The backend that is never far from the fastest, alone and with its backward after it, of those that are slower than PyTorch in neither: a forward gives
    the same bits whether or not a backward follows."""
    best = min(forward.values()), min(both.values())
    further = {name: max(forward[name] / best[0], both[name] / best[1]) for name in forward if name in both}
    bounds = [min((of[name] for name in PYTORCH if name in of), default=math.inf) / WITHIN for of in (forward, both)]
    quick = {name: value for name, value in further.items() if forward[name] <= bounds[0] and both[name] <= bounds[1]}
    return _choose(op, "forward", dtype, size, forward, _first(quick or further))


def pick_backward(op: str, dtype: str, size: tuple[int, ...], times: Mapping[str, float], first: str) -> Choice:
    """After a forward on `first`, of the times of both: `first` again unless a mixture is much faster."""
    keeps = MIXED_WITHIN * times.get(first, math.inf) <= min(times.values())
    return _choose(op, "backward", dtype, size, times, first if keeps else _first(times))


def _first(times: Mapping[str, float]) -> str:
    limit = max(min(times.values()), 0.0) / WITHIN  # differences of short times can come out below 0
    return next(name for name in _dispatch.PREFERENCE if times.get(name, math.inf) <= limit)


def _choose(op: str, direction: str, dtype: str, size: tuple[int, ...], times: Mapping[str, float], backend: str) -> Choice:
    others = {name: value for name, value in times.items() if name != backend}
    over = min(others, key=lambda name: others[name], default="")
    ratio = others[over] / max(times[backend], 1e-9) if over else math.nan
    return Choice(op, direction, dtype, size, backend, ratio, over)
