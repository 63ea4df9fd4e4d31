"""Plans (ov3fast/_plans.py) of launchers of Triton kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ov3fast import _plans

from . import config as configs
from . import cuda_driver
from . import launch as launches
from .common import INTERPRETED

ALIGNMENT = 16
"""In bytes. Triton specialises on addresses that are multiples of this, which allocators guarantee."""


def planned(launcher: Callable[..., Any], where: Callable[[Sequence[Any]], bool] | None = None) -> Callable[..., Any]:
    """Wraps `launcher` with plans, for calls whose arguments `where` accepts; not in the interpreter, which launches nothing that could be recorded."""
    return launcher if INTERPRETED else Planned(launcher, where)


class Planned(_plans.Planned):
    """`launcher`, with a plan that also depends on the current device, the kernels' configurations and addresses being aligned."""

    launches = launches

    def __init__(self, launcher: Callable[..., Any], where: Callable[[Sequence[Any]], bool] | None = None):
        super().__init__(launcher)
        self.where = where

    def can_be_noted(self, args: Sequence[Any]) -> bool:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        here = all(tensor.get_device() < 0 or tensor.get_device() == torch.cuda.current_device() for tensor in tensors)
        aligned = all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
        return (
            bool(tensors)
            and here
            and aligned
            and (self.where is None or self.where(args))
            and configs.generation >= 0
            and launches.OURS
            and not launches.is_watched()
        )

    def writer(self, notes: _plans.Notes, result: Any) -> _plans.Writer:
        self.generation = configs.generation
        return _Writer(notes, result, self.otherwise)

    def otherwise(self, *args: Any) -> Any:
        """If the configurations have changed, the plan is made again."""
        if configs.generation >= 0 and configs.generation != self.generation:
            self.passed, self.run = 0, self._early
        return self.launcher(*args)


class _Writer(_plans.Writer):
    def __init__(self, notes: _plans.Notes, result: Any, otherwise: Callable[..., Any]):
        super().__init__(notes, result, otherwise)
        self.device = next(arg for arg in notes.args if isinstance(arg, Tensor)).get_device()
        self.names |= {
            "configs": configs, "is_watched": launches.is_watched, "current_device": torch.cuda.current_device,
            "rooms": launches.rooms(), "stream_of": launches.stream_of(), "pointer": ctypes.c_void_p, "refuse": cuda_driver.refuse,
        }  # fmt: skip

    def conditions(self, launched: bool) -> list[str]:
        here = [f"current_device() != {self.device}"] if self.device >= 0 else []
        return [f"configs.generation != {configs.generation}", *here, *(["is_watched()"] if launched else [])]

    def before_launches(self, launched: bool) -> list[str]:
        lines = []
        if self.pointed:
            addresses = " | ".join(f"p_{name}" for name in self.pointed)
            lines.append(f"if ({addresses}) & {ALIGNMENT - 1}: return otherwise({self.parameters})")
        if launched:
            lines += [
                f"room = rooms.of.get({self.device}) or rooms.make({self.device})",
                "record, size, extra, launch = room.record, room.size, room.extra, room.launch",
                f"stream = pointer(stream_of({self.device}))",
            ]
        return lines

    def launch(self, launch: Any, grid: tuple[int, ...], args: Sequence[Any]) -> list[str]:
        if launch is None:
            raise _plans.NotPlannable("Triton's own launch")
        x, y, z = (*grid, 1, 1)[:3]
        number = len(self.names)
        self.names |= {f"pack{number}": launch.pack, f"f{number}": launch.function, f"kept{number}": launch.compiled}
        record = [self.argument(args[place]) for place in launch.arguments]
        return [
            f"pack{number}(record, 0, {', '.join(record)}, 0, 0)",
            f"size.value = {launch.size}",
            f"error = launch(f{number}, {x}, {y}, {z}, {launch.threads}, 1, 1, {launch.shared}, stream, None, extra)",
            "if error: refuse('cuLaunchKernel', error)",
        ]
