"""The CPU backend: C++ kernels of csrc/cpu, called through ctypes.

One library per instruction set was built at installation; the widest that this processor runs is loaded at the first call, or the one
that OV3FAST_CPU_ISA names (a narrower one, for tests). Each operator's file here lays out its arguments and registers itself.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(os.environ.get("OV3FAST_NATIVE") or Path(__file__).parents[2] / "_native")
"""Where the libraries lie; OV3FAST_NATIVE names another build of them, as `make sanitize` does."""

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
"""From the narrowest to the widest."""

EMULATED = "amx_emulated"
"""The kernels of amx_bf16 on a model of the tile unit, equal to the bit and slow: for tests, never taken unless it is asked for."""

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_forced: str | None = os.environ.get("OV3FAST_CPU_ISA") or None


@functools.cache
def best_isa() -> str:
    """The widest instruction set that this processor runs."""
    ask = ctypes.CDLL(str(FOLDER / "ov3_portable.so")).ov3_best_isa
    ask.restype = ctypes.c_char_p
    return ask().decode()


@functools.cache
def available_isas() -> tuple[str, ...]:
    """What was built and runs here, the narrowest first, the emulation before the rest; none without the kernels."""
    if not (FOLDER / "ov3_portable.so").is_file():
        return ()
    runs = ISAS[: ISAS.index(best_isa()) + 1]
    if "avx512_bf16" in runs:
        runs = (EMULATED, *runs)
    return tuple(isa for isa in runs if (FOLDER / f"ov3_{isa}.so").is_file())


def isa() -> str:
    """The instruction set in use. ValueError where OV3FAST_CPU_ISA names one that does not run here."""
    found = available_isas()
    if _forced is None:
        return found[-1]
    if _forced not in found:
        raise ValueError(f"OV3FAST_CPU_ISA must be one of {', '.join(found)} on this machine, got {_forced!r}")
    return _forced


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block, the kernels of that instruction set run."""
    global _forced
    before, _forced = _forced, name
    try:
        isa()
        yield
    finally:
        _forced = before


def missing() -> str | None:
    """Why the backend can't run at all, or None."""
    if not available_isas():
        return "the CPU kernels were not built (pip install needs a C++ compiler)"
    return None


def refuses(*tensors: Tensor | None) -> str | None:
    """Why the kernels can't take these tensors, or None: they take float32 and bfloat16 on the CPU."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it does not run on {tensor.device.type}"
        if tensor.dtype not in _SUFFIX and tensor.dtype != torch.int64:
            return f"it does not take {tensor.dtype}"
    return None


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(FOLDER / f"ov3_{name}.so"))


@functools.cache
def _function(name: str, dtype: torch.dtype, parameters: torch.dtype, isa: str) -> Any:
    suffix = _SUFFIX[dtype] if parameters == dtype else f"{_SUFFIX[dtype]}_{_SUFFIX[parameters]}"
    return getattr(_library(isa), f"ov3_{name}_{suffix}")


def run(name: str, dtype: torch.dtype, *arguments: Any, parameters: torch.dtype | None = None) -> None:
    """Calls the kernel `name` for elements of `dtype`, and parameters of the same or of the one given.

    Tensors go as pointers (None as null), bool and int as int64, float as double.
    """
    function = _function(name, dtype, parameters or dtype, isa())
    if function.argtypes is None:
        function.argtypes = [*map(_c_type, arguments), ctypes.c_int64]
    values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    if function(*values, torch.get_num_threads()):
        raise MemoryError(f"{name}: no memory for its work space")


def _c_type(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p
    return ctypes.c_double if isinstance(value, float) else ctypes.c_int64


def unit_stride(x: Tensor) -> Tensor:
    """x whose last axis is contiguous; no copy where it is already."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """[..., K] -> [R, K] whose last axis is contiguous; no copy where the layout allows."""
    return unit_stride(x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def dense(x: Tensor | None) -> Tensor | None:
    """An optional small tensor, contiguous."""
    return None if x is None else x.contiguous()


def wide(x: Tensor | None) -> Tensor | None:
    """A small parameter (a bias, a weight per channel) as contiguous float32."""
    return None if x is None else x.to(torch.float32).contiguous()


def empty(like: Tensor, shape: Any, needed: bool = True) -> Tensor:
    """Room for a result, or an empty tensor where it is not asked for."""
    return like.new_empty(shape if needed else 0)


def pointer(tensor: Tensor, needed: bool) -> Tensor | None:
    """The tensor, or None (null in C++: do not compute) where it is not asked for."""
    return tensor if needed else None


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
