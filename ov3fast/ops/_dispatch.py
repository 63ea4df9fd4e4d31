"""Which backend runs an operator: registration, choice, and the table that `ov3fast doctor` prints.

A backend supplies plain functions on tensors, a forward and a backward, that share one contract per operator: the same
inputs, the same outputs and the same saved tensors as the reference. Autograd, fake tensors and validation are written
once, in the operator's own file, so a backend can be swapped (or mixed between forward and backward) freely.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tried in this order when nobody asks for one by name.
PREFERENCE = ("cuda", "triton", "flash_attn_3", "flash_attn", "cudnn", "xformers", "cpu", "sdpa", "reference")

# Every operator of the package runs through one of these, so `define` needs one library object only.
LIBRARY = torch.library.Library("ov3fast", "DEF")


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    missing: Callable[[], str | None]
    """Why it can't run in this environment at all (no compiler, no such package), or None."""
    refuses: Callable[..., str | None]
    """Why it can't take these forward arguments (dtype, device, size), or None."""
    refuses_backward: Callable[..., str | None]
    """The same for the backward's arguments."""
    slower_than: Callable[..., Sequence[str]]
    """Backends that are faster on these forward arguments, the best first: one that can takes them over, unless this one is asked for."""
    slower_than_backward: Callable[..., Sequence[str]]
    """The same for the backward's arguments."""


_backends: dict[str, dict[str, Backend]] = {}
_override: str | None = os.environ.get("OV3FAST_IMPL") or None


def _never(*_: Any) -> None:
    return None


def _none(*_: Any) -> Sequence[str]:
    return ()


def register(
    op: str,
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    missing: Callable[[], str | None] = _never,
    refuses: Callable[..., str | None] = _never,
    refuses_backward: Callable[..., str | None] = _never,
    slower_than: Callable[..., Sequence[str]] = _none,
    slower_than_backward: Callable[..., Sequence[str]] = _none,
) -> None:
    """Makes `name` a backend of `op`. The functions take the registered operator's arguments, without `impl`."""
    if name not in PREFERENCE:
        raise ValueError(f"{op}: backend name must be one of {', '.join(PREFERENCE)}, got {name!r}")
    _backends.setdefault(op, {})[name] = Backend(
        forward, backward, missing, refuses, refuses_backward, slower_than, slower_than_backward
    )  # fmt: skip


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block, every operator that has backend `name` runs on it; the others choose for themselves.

    Raises ValueError for a name that no operator has.
    """
    global _override
    _check_name(name)
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def table() -> dict[str, dict[str, str]]:
    """op -> backend -> 'ready', or the reason why it can't run here."""
    return {
        op: {name: backends[name].missing() or "ready" for name in PREFERENCE if name in backends}
        for op, backends in sorted(_backends.items())
    }


def request(op: str, impl: str | None) -> str:
    """The word that travels into the registered operator: '' for any, 'x' for x or an error, '~x' for x where it exists."""
    if impl is not None:
        if impl not in _backends.get(op, {}):
            known = ", ".join(name for name in PREFERENCE if name in _backends.get(op, {}))
            raise ValueError(f"{op}: impl must be one of {known}; got {impl!r}")
        return impl
    if _override is None:
        return ""
    _check_name(_override)
    return "~" + _override


def choose(op: str, word: str, args: tuple[Any, ...]) -> Backend:
    """The backend that `request`'s word means for these forward arguments. RuntimeError, with the reason, where none can."""
    return _first(
        op, word, lambda backend: backend.missing() or backend.refuses(*args), lambda backend: backend.slower_than(*args)
    )


def _choose_backward(op: str, word: str, args: tuple[Any, ...]) -> Backend:
    """Like `choose`; a forward-only backend leaves the backward to the next one that can, since both keep one contract."""
    if _backends[op].get(word.removeprefix("~")) is None or _backends[op][word.removeprefix("~")].backward is None:
        word = ""

    def obstacle(backend: Backend) -> str | None:
        if backend.backward is None:
            return "it has no backward"
        return backend.missing() or backend.refuses_backward(*args)

    return _first(op, word, obstacle, lambda backend: backend.slower_than_backward(*args))


def _first(
    op: str, word: str, obstacle: Callable[[Backend], str | None], slower_than: Callable[[Backend], Sequence[str]]
) -> Backend:
    backends = _backends[op]
    wanted = word.removeprefix("~")
    if wanted in backends:
        reason = obstacle(backends[wanted])
        if reason is not None:
            raise RuntimeError(f"{op}: impl={wanted!r} can't run this call: {reason}")
        return backends[wanted]
    for name in PREFERENCE:
        if name in backends and obstacle(backends[name]) is None:
            faster = (other for other in slower_than(backends[name]) if other in backends and obstacle(backends[other]) is None)
            return backends[next(faster, name)]
    raise RuntimeError(f"{op}: no backend takes this call; see `ov3fast doctor`")


def chosen(op: str, word: str, *args: Any) -> str:
    """Name of the backend that would run this call (for reports and tests)."""
    backend = choose(op, word, args)
    return next(name for name, candidate in _backends[op].items() if candidate is backend)


def define(
    op: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    backward_schema: str | None = None,
    backward_fake: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers `ov3fast::op` (and `ov3fast::op_backward`), each with a trailing `str impl`, over the backends of `op`.

    `schema` is the part behind the name, e.g. "(Tensor x, float eps) -> (Tensor y, Tensor rstd)". `fake` gives the outputs'
    shapes. `setup_context` and `backward` are autograd's; the latter calls `torch.ops.ov3fast.<op>_backward`. The fakes take the
    arguments without `impl`.
    """

    def forward_impl(*args: Any) -> Any:
        *inputs, word = args
        return choose(op, word, tuple(inputs)).forward(*inputs)

    _define(op, schema, forward_impl, fake)
    if backward_schema is None:
        return

    def backward_impl(*args: Any) -> Any:
        *inputs, word = args
        return _choose_backward(op, word, tuple(inputs)).backward(*inputs)

    _define(f"{op}_backward", backward_schema, backward_impl, backward_fake)
    torch.library.register_autograd(f"ov3fast::{op}", backward, setup_context=setup_context, lib=LIBRARY)


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    arguments, returns = schema.split("->")
    arguments = arguments.strip().removesuffix(")") + ", str impl)"
    LIBRARY.define(f"{name}{arguments} ->{returns}")
    LIBRARY.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ov3fast::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The public functions cast under torch.autocast; inside an operator it would narrow what the backend keeps in float32."""

    def run(*args: Any) -> Any:
        device = _device_type(args)
        if not torch.is_autocast_enabled(device):
            return implementation(*args)
        with torch.autocast(device, enabled=False):
            return implementation(*args)

    return run


def _device_type(args: tuple[Any, ...]) -> str:
    """Of the first tensor among the arguments, lists included."""
    flat = (value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return next((value.device.type for value in flat if isinstance(value, Tensor)), "cpu")


def _check_name(name: str) -> None:
    if name not in PREFERENCE:
        raise ValueError(f"impl must be one of {', '.join(PREFERENCE)}; got {name!r} (argument, ops.use or OV3FAST_IMPL)")
