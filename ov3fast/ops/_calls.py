"""Sample calls of each operator, at any size, for the tests of every backend, the benches and `ov3fast tune`.

An operator's file lists its CALLS; the caller supplies the random draws.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Size = tuple[int, ...]
Draw: TypeAlias = Callable[..., Tensor]
"""(*shape, scale=1.0) -> a floating tensor of normal values."""


def _plainly(function: Callable[..., Any], *arguments: Tensor) -> Any:
    return function(*arguments)


def _as_it_is(*size: int) -> Size:
    return size


@dataclass(frozen=True, eq=False)
class Call:
    """One way of calling an operator."""

    op: str
    """As ops.table() names it."""
    function: Callable[..., Any]
    """The public function."""
    reference: Callable[..., Any]
    arguments: Callable[..., Sequence[Tensor]]
    """(draw, *size) -> arguments."""
    least: Size
    """For derivatives of any order, which are checked element by element."""
    tiny: Size
    """For the interpreter: a few programs per launch, with ragged edges."""
    real: Size
    """A size of training."""
    label: str = ""
    """Tells the calls of one operator apart."""
    apply: Callable[..., Any] = _plainly
    """(function, *arguments) -> outputs, for the public function and the reference alike."""
    measured: tuple[Size, ...] = ()
    """Sizes that `ov3fast tune` measures."""
    counted: Callable[..., Size] = _as_it_is
    """(*size) -> the size as the choice of backends counts it, in _choice.DIMENSIONS."""
    data: tuple[int, ...] = ()
    """Positions of arguments that need no gradient in training."""
    parameters: tuple[int, ...] = ()
    """Positions of parameters, if these may be float32 beside narrower activations."""
    single: tuple[int, ...] = ()
    """Positions of arguments that stay float32 when the others are narrower."""
    differentiable: bool = True
    refused: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    """Backend -> dtypes that it refuses by contract."""

    @property
    def name(self) -> str:
        return f"{self.op}-{self.label}" if self.label else self.op

    def make(self, draw: Draw, size: Size, dtype: torch.dtype, parameters: torch.dtype | None = None) -> list[Tensor]:
        """Arguments of that size and dtype; `parameters` is that of the parameters, if it is another."""
        made = []
        for i, value in enumerate(self.arguments(draw, *size)):
            kind = (parameters or dtype) if i in self.parameters else dtype
            kind = torch.float32 if i in self.single and kind.itemsize < 4 else kind
            made.append(value.to(kind) if value.is_floating_point() else value)
        return made


class Bound:
    """A call with its arguments: functions of its leaves alone."""

    def __init__(self, call: Call, arguments: Sequence[Tensor], *, data: bool = False):
        """The leaves are the floating arguments; those of `call.data` only if `data`."""
        fixed = () if data else call.data
        self.call, self.arguments = call, list(arguments)
        self.positions = [
            i for i, v in enumerate(arguments) if v.is_floating_point() and i not in fixed and call.differentiable
        ]
        self.leaves = [self.arguments[i].detach().requires_grad_() for i in self.positions]

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the public function's arguments, as a function of the leaves."""
        apply = self.call.apply
        return self.plain(function if apply is _plainly else lambda *arguments: apply(function, *arguments))

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the call's arguments as they are listed, as a function of the leaves."""
        if len(self.positions) == len(self.arguments):
            return function

        def of_leaves(*leaves: Tensor) -> Any:
            arguments = list(self.arguments)
            for i, leaf in zip(self.positions, leaves, strict=True):
                arguments[i] = leaf
            return function(*arguments)

        return of_leaves


def every() -> list[Call]:
    """The calls of all operators."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = (importlib.import_module(f"{__package__}.{name}") for name in names if not name.startswith("_"))
    return [call for module in modules for call in getattr(module, "CALLS", ())]
