"""Plans (ov3fast/_plans.py) of the functions that run kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ov3fast import _plans
from ov3fast.ops import cpu


class Planned(_plans.Planned):
    """`launcher`, with a plan that also depends on the instruction set and the number of threads."""

    launches = cpu

    # A plan costs a millisecond to make: calls of a kind that comes up only now and then, such as each length of a growing text, do without.
    BEFORE = 32

    def writer(self, notes: _plans.Notes, result: Any) -> _plans.Writer:
        return _Writer(notes, result, self.otherwise)


class _Writer(_plans.Writer):
    def __init__(self, notes: _plans.Notes, result: Any, otherwise: Callable[..., Any]):
        super().__init__(notes, result, otherwise)
        self.threads = torch.get_num_threads()
        self.names |= {"forced_isa": cpu.forced_isa, "threads": torch.get_num_threads}

    def conditions(self, launched: bool) -> list[str]:
        # Work space may be sized by the number of threads.
        return [f"forced_isa() is not {self.constant(cpu.forced_isa())}", f"threads() != {self.threads}"] if launched else []

    def launch(self, function: Any, arguments: Sequence[Any]) -> list[str]:
        number = len(self.names)
        self.names[f"f{number}"] = function
        values = ", ".join(map(self.argument, arguments))
        return [f"if f{number}({values}, {self.threads}): return otherwise({self.parameters})"]  # who says what is wrong
