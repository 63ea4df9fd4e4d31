"""Which backend runs an operator: registration, choice, and the table that `ov3fast doctor` prints.

A backend supplies plain functions on tensors, a forward and a backward, under one contract per operator: the same inputs, outputs and saved
tensors as the `eager` backend, which is PyTorch. Autograd, fake tensors and validation are written once (`_operator.py` and the operator's own
file), so backends can be swapped, or mixed between forward and backward.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

# Those that come with ov3fast, in the order in which they are tried when nobody asks for one by name.
PREFERENCE = ("cuda", "triton", "flash_attn_3", "flash_attn", "cudnn", "xformers", "cpu", "sdpa", "eager", "onednn")

# Accepted wherever a backend is named.
ALIASES = {"reference": "eager"}

Request: TypeAlias = str
"""The backend that a call asks for, by its name, or AUTOMATIC. It travels through an operator's schema as a str; `decode` reads it."""

AUTOMATIC: Request = ""


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    operands: tuple[str, ...]
    """The arguments, as the schemas name them, that the functions below are called with, for forward and backward calls alike."""
    unavailable_reason: Callable[[], str | None]
    """Why it can't run in this environment at all (no compiler, package not installed), or None."""
    unsupported_reason: Callable[..., str | None]
    """Why it can't take these operands, or None. It may look at devices, dtypes, shapes, strides, ints, bools and strs, but not at values or
    floats: the answer is remembered."""
    slower_than: Callable[..., Sequence[str]]
    """Backends that are faster on these operands, the best first: the first that can run the call takes it over, unless this one is named."""
    slower_than_backward: Callable[..., Sequence[str]]
    """The same for backward calls."""
    differentiable: Callable[..., Callable[..., Any] | None]
    """The operator's arguments -> the forward as a function that PyTorch's own autograd differentiates, or None where they have none. An eager call that goes
    forward and backward on this backend runs it, without a node of ours: the operator's arguments -> its outputs that have gradients."""
    of_one_kind: Callable[[Callable[..., Any]], Callable[..., Any]] | None
    """forward or backward -> the same for calls that agree in all that choices depend on, so that it may remember what follows from that."""


class Selected:
    """What runs the calls of one kind: those that agree in all that a choice depends on."""

    __slots__ = ("backwards", "contract", "function", "inference")

    def __init__(
        self,
        function: Callable[..., Any],
        inference: Callable[..., Any] | None = None,
        contract: Callable[..., Any] | None = None,
    ):
        self.function = function
        self.inference = inference or function
        """The same where nothing is kept for a backward."""
        self.contract = contract
        """Where PyTorch differentiates `function`: the one that returns all that the operator's contract names."""
        self.backwards: dict[tuple[Any, ...], list[Any]] = {}
        """What _operator.py knows of the backward calls that follow, by what it can't know from the forward."""


_order = list(PREFERENCE)
_backends: dict[str, dict[str, Backend]] = {}
_selectors: list[Selector] = []
_override: str | None = os.environ.get("OV3FAST_IMPL") or None


def _no_reason(*_: Any) -> None:
    return None


def _no_backends(*_: Any) -> Sequence[str]:
    return ()


def register(
    op: str,
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    before: str | None = None,
    operands: tuple[str, ...] = (),
    unavailable_reason: Callable[[], str | None] = _no_reason,
    unsupported_reason: Callable[..., str | None] = _no_reason,
    slower_than: Callable[..., Sequence[str]] = _no_backends,
    slower_than_backward: Callable[..., Sequence[str]] | None = None,
    differentiable: Callable[..., Callable[..., Any] | None] = _no_reason,
    of_one_kind: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> None:
    """Make `name` a backend of `op`; see Backend. forward and backward take the registered operator's arguments, without `impl`.

    A name that is new is tried just before the backend called `before`, by every operator that gets it, or else after all others, so only
    where it is asked for. Raises ValueError for a `before` that is unknown, and for a name that is empty or an alias.
    """
    if not name or name in ALIASES:
        raise ValueError(f"{op}: a backend can't be called {name!r}")
    if before is not None and before not in _order:
        raise ValueError(f"{op}: before must be one of {', '.join(_order)}, got {before!r}")
    if name not in _order:
        _order.insert(len(_order) if before is None else _order.index(before), name)
    _backends.setdefault(op, {})[name] = Backend(
        forward,
        backward,
        operands,
        unavailable_reason,
        unsupported_reason,
        slower_than,
        slower_than_backward or slower_than,
        differentiable,
        of_one_kind,
    )
    forget_choices()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block, every operator that has backend `name` runs on it; the others choose for themselves.

    Raises ValueError for a name that no operator has.
    """
    global _override
    before, _override = _override, _known(name)
    try:
        yield
    finally:
        _override = before


def override() -> str | None:
    """The backend that `use` or OV3FAST_IMPL names."""
    return _override


def table() -> dict[str, dict[str, str]]:
    """op -> backend -> 'ready', or the reason why it can't run here."""
    return {
        op: {name: backends[name].unavailable_reason() or "ready" for name in _order if name in backends}
        for op, backends in sorted(_backends.items())
    }


def request(op: str, impl: str | None) -> Request:
    """What a call asks for: `impl`, else what `use` or OV3FAST_IMPL name where `op` has it. ValueError for an `impl` that `op` lacks."""
    if impl is None:
        if _override is None:
            return AUTOMATIC
        name = _known(_override)
        return name if name in _backends[op] else AUTOMATIC
    name = decode(impl)
    if name not in _backends[op]:
        known = ", ".join(name for name in _order if name in _backends[op])
        raise ValueError(f"{op}: impl must be one of {known}; got {impl!r}")
    return name


def decode(word: str) -> Request:
    """The request that travelled through a schema as `word`."""
    return ALIASES.get(word, word)


class Selector:
    """Chooses the backend for the forward or for the backward calls of one operator, and remembers its choices.

    A choice depends on the request and on what `Backend.unsupported_reason` may look at, which is the key under which it is kept. An empty
    call goes to `eager` where that can take it, so no kernel needs code for one.
    """

    def __init__(
        self,
        op: str,
        schema: str,
        *,
        backward: bool,
        inputs: Sequence[str],
        check: Callable[..., None] = _no_reason,
        alignment_matters: bool = False,
    ):
        """`inputs` are the names of the tensors that make a call empty when one of them is. `check` raises for arguments that are wrong."""
        parameters = parse_schema(schema)
        self.op, self.backward = op, backward
        self._position = {name: i for i, (_, name) in enumerate(parameters)}
        self._inputs = [self._position[name] for name in inputs if name in self._position]
        self.remembers = not any("[]" in kind for kind, _ in parameters)
        self._check, self.alignment_matters = check, alignment_matters
        self._choices: dict[tuple[Any, ...], Selected] = {}
        self.kinds: dict[tuple[Any, ...], list[Any]] = {}
        """What _operator.py knows of eager calls."""
        _selectors.append(self)

    def __call__(self, request: Request, args: Sequence[Any]) -> Selected:
        """What to run. RuntimeError, with the reason, where nothing can."""
        if not self.remembers:
            return self._selected(self.select_backend(request, args), request, args)
        key: list[Any] = [request]
        for arg in args:
            if isinstance(arg, Tensor):
                key += arg.dtype, arg.device, arg.shape, arg.stride()
                if self.alignment_matters:
                    key.append(arg.data_ptr() % 16)
            elif type(arg) is not float:
                key.append(arg)
        found = self._choices.get(choice := tuple(key))
        if found is None:
            self._check(*args)
            if len(self._choices) >= 4096:
                self.forget()
            found = self._choices[choice] = self._selected(self.select_backend(request, args), request, args)
        return found

    def forget(self) -> None:
        self._choices.clear()
        self.kinds.clear()

    def select_backend(self, request: Request, args: Sequence[Any]) -> str:
        """The name of the backend for this call, worked out anew."""
        backends = _backends[self.op]
        request = decode(request)
        if self.backward and request and (request not in backends or backends[request].backward is None):
            request = AUTOMATIC  # after a forward-only backend the next one runs the backward, under the same contract
        eager_takes_empty = any(args[i].numel() == 0 for i in self._inputs if isinstance(args[i], Tensor))
        eager_takes_empty = eager_takes_empty and "eager" in backends and self._obstacle(backends["eager"], args) is None
        if request in backends:
            reason = self._obstacle(backends[request], args)
            if reason is not None:
                raise RuntimeError(f"{self.op}: impl={request!r} can't run this call: {reason}")
            return "eager" if eager_takes_empty else request
        if eager_takes_empty:
            return "eager"
        for name in _order:
            if name in backends and self._obstacle(backends[name], args) is None:
                backend = backends[name]
                slower_than = backend.slower_than_backward if self.backward else backend.slower_than
                faster = slower_than(*self._operands(backend, args))
                return next((n for n in faster if n in backends and self._obstacle(backends[n], args) is None), name)
        raise RuntimeError(f"{self.op}: no backend takes this call; see `ov3fast doctor`")

    def _selected(self, name: str, request: Request, args: Sequence[Any]) -> Selected:
        backend = _backends[self.op][name]
        function = backend.backward if self.backward else backend.forward
        assert function is not None
        whole = None if self.backward else backend.differentiable(*args)
        if whole is not None and self._goes_back_on(name, request, args):
            return Selected(whole, contract=function)
        inference = getattr(function, "inference", None)
        if self.remembers and backend.of_one_kind is not None:
            return Selected(backend.of_one_kind(function), inference and backend.of_one_kind(inference))
        return Selected(function, inference)

    def _goes_back_on(self, name: str, request: Request, args: Sequence[Any]) -> bool:
        """Whether the same backend would run the backward of this forward call."""
        if decode(request) == name:
            return True
        for other in _order:
            backend = _backends[self.op].get(other)
            if backend is not None and backend.backward is not None and self._obstacle(backend, args) is None:
                faster = backend.slower_than_backward(*self._operands(backend, args))
                return name in faster[:1] if faster else other == name
        return False

    def _obstacle(self, backend: Backend, args: Sequence[Any]) -> str | None:
        if self.backward and backend.backward is None:
            return "it has no backward"
        return backend.unavailable_reason() or backend.unsupported_reason(*self._operands(backend, args))

    def _operands(self, backend: Backend, args: Sequence[Any]) -> list[Any]:
        # A backward may take an input's saved gradient in its place.
        return [args[self._position[name if name in self._position else f"grad_{name}"]] for name in backend.operands]


def forget_choices() -> None:
    """Drops remembered choices: something changed that their keys don't hold, such as the registered backends."""
    for selector in _selectors:
        selector.forget()


def chosen(op: str, word: str, *args: Any) -> str:
    """Name of the backend that would run this forward call (for reports and tests), worked out anew."""
    selector = next(s for s in _selectors if s.op == op and not s.backward)
    return selector.select_backend(decode(word), args)


def parse_schema(schema: str) -> list[tuple[str, str]]:
    """(type, name) of every argument: "(Tensor x, float eps) -> Tensor" gives [("Tensor", "x"), ("float", "eps")]."""
    arguments = re.sub(r"\(\w+!\)", "", schema.split("->")[0]).strip().removeprefix("(").removesuffix(")")
    return [(kind, name) for kind, name in (argument.split() for argument in arguments.split(","))]


def _known(name: str) -> str:
    name = decode(name)
    if name not in _order:
        raise ValueError(f"impl must be one of {', '.join(_order)}; got {name!r} (argument, ops.use or OV3FAST_IMPL)")
    return name
