"""Measured choices: a module's fastest variant whose error is within the budget, cached by machine and module."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast.inference import fusions
from ov3fast.io import atomic_write
from ov3fast.models.vit import ViTEncoder
from ov3fast.testing import error_and_budget

SECONDS, ROUNDS = 0.2, 7
"""Length of a measurement: rounds of one call per variant, until both are reached."""
GAIN = 0.98
"""A variant must take at most this fraction of eager's time to be preferred."""


def measure(unit: nn.Module, inputs: tuple[Any, Any], what: str) -> tuple[str, str]:
    """(the fastest of eager, ours and compile, what was measured)."""
    args, kwargs = inputs
    variants: dict[str, nn.Module] = {"eager": unit}
    notes = [what]
    ours = twin(unit)
    fusions.fuse(ours)
    try:
        expected, got = _tensor(unit(*args, **kwargs)), _tensor(ours(*args, **kwargs))
        error, budget = error_and_budget(got, expected, _exact(unit, args, kwargs))
        if error <= budget:
            variants["ours"] = ours
        else:
            notes.append(f"ours: error {error:.2e} is over the budget {budget:.2e}")
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as failure:
        notes.append(f"ours: {str(failure).splitlines()[0]}")
    try:
        variants["compile"] = compiled(unit, args, kwargs)
    except Exception as failure:  # compilers fail in many ways; after any failure the variant is left out
        notes.append(f"compile: {(str(failure) or type(failure).__name__).splitlines()[0]}")
    taken = dict(zip(variants, times([lambda v=v: v(*args, **kwargs) for v in variants.values()]), strict=True))  # type: ignore[misc]
    best = min(taken, key=taken.__getitem__)
    if taken[best] > GAIN * taken["eager"]:
        best = "eager"
    notes.append(", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in taken.items()))
    return best, "; ".join(notes)


def measure_int8(conv: nn.Module, x: Tensor, behind_norm: bool) -> tuple[str, str]:
    """("int8" or "ours", what was measured) for a calibrated convolution against the packed one: with few channels the rounding costs more than it saves.

    behind_norm: a norm does the rounding.
    """
    wide = twin(conv)
    fusions.fuse_convolution(wide)
    given = fusions.quantized_input(conv, x) if behind_norm else x
    ours, small = times([lambda: wide(x), lambda: conv(given)])
    words = f"int8 {small * 1e3:.3f} ms, {str(x.dtype).removeprefix('torch.')} {ours * 1e3:.3f} ms"
    return "int8" if small < GAIN * ours else "ours", words


def _exact(unit: nn.Module, args: Any, kwargs: Any) -> Tensor:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return _tensor(copy.deepcopy(unit).double()(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()}))


def compiled(unit: nn.Module, args: Any, kwargs: Any) -> nn.Module:
    made: nn.Module = twin(unit)
    made.compile(dynamic=False)
    made(*args, **kwargs)
    return made


def times(calls: list[Callable[[], Any]]) -> list[float]:
    """Medians in seconds, with the variants interleaved."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:  # warm-up
        call()
    end = time.perf_counter() + SECONDS * len(calls)
    while len(taken[0]) < ROUNDS or time.perf_counter() < end:
        for call, seconds in zip(calls, taken, strict=True):
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def inputs_of(base: nn.Module, units: dict[str, str], run: Callable[[], Any]) -> dict[str, tuple[Any, Any]]:
    """Path -> (args, kwargs) of the unit's first call."""
    seen: dict[str, tuple[Any, Any]] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.setdefault(path, (args, kwargs)) and None

    hooks = [base.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in units]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _tensor(output: Any) -> Tensor:
    """Our blocks return the residual stream and the branch that is still to be added."""
    if isinstance(output, Tensor):
        return output
    pair = len(output) == 2 and all(isinstance(part, Tensor) for part in output) and output[0].shape == output[1].shape
    stream: Tensor = output[0] + output[1] if pair else output[0]
    return stream


def twin(module: Any) -> Any:
    """New modules on the same parameters and buffers."""
    shared: list[Tensor] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if isinstance(part, ViTEncoder) and part.vae is not None:
            shared += [*part.vae.parameters(), *part.vae.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


class Memory:
    """This machine's choices, in a file: key -> (choice, what was measured)."""

    def __init__(self) -> None:
        self.path = Path(os.environ.get("OV3FAST_CACHE") or "~/.cache/ov3fast").expanduser() / "optimize.json"
        try:
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.values = {}
        if not isinstance(self.values, dict):
            self.values = {}

    def get(self, key: str) -> tuple[str, str] | None:
        found = self.values.get(key)
        known = isinstance(found, list) and len(found) == 2 and found[0] in ("ours", "eager", "compile", "int8")
        return (found[0], str(found[1])) if known else None

    def put(self, key: str, value: tuple[str, str]) -> None:
        if self.values.get(key) == list(value):
            return
        self.values[key] = list(value)
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.values, indent=1), encoding="utf-8")
        except OSError:  # a measurement that can't be stored is repeated next time
            pass


def key_of(unit: nn.Module, inputs: tuple[Any, Any]) -> str:
    def word(value: Any) -> str:
        return (
            f"{tuple(value.shape)}{value.stride()}{value.dtype}{value.device}"
            if isinstance(value, Tensor)
            else repr(value)[:200]
        )

    args, kwargs = inputs
    from ov3fast import __version__

    parts = [
        *_machine(), __version__, torch.__version__, type(unit).__name__, repr(unit),
        *(f"{name}{tuple(p.shape)}{p.dtype}" for name, p in unit.named_parameters()),
        *map(word, args), *(f"{name}={word(value)}" for name, value in sorted(kwargs.items())),
    ]  # fmt: skip
    return f"{type(unit).__name__} {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:24]}"


def _machine() -> list[str]:
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        chip += next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), "")
    return [platform.machine(), chip, str(torch.get_num_threads()), os.environ.get("OV3FAST_IMPL", "")]
