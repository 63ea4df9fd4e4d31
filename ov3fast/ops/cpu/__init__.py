"""The CPU backend: C++ kernels of csrc/cpu, called through ctypes.

One library per instruction set was built at installation; the widest that this processor runs is loaded at the first call, or the one
that OV3FAST_CPU_ISA names (a narrower one, for tests). An operator's file declares its kernels, lays out their arguments with what stands
here, and registers them. A library is loaded once its kernels have the types that the declarations say.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _dispatch

FOLDER = Path(os.environ.get("OV3FAST_NATIVE") or Path(__file__).parents[2] / "_native")
"""Where the libraries lie; OV3FAST_NATIVE names another build of them, as `make sanitize` does."""

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
"""From the narrowest to the widest."""

EMULATED = "amx_emulated"
"""The kernels of amx_bf16 on a model of the tile unit, equal to the bit and slow: for tests, never taken unless it is asked for."""

_C_TYPES: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
_C_NAME = {torch.float32: "float", torch.bfloat16: "bf16"}
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_forced: str | None = os.environ.get("OV3FAST_CPU_ISA") or None


@functools.cache
def best_isa() -> str:
    """The widest instruction set that this processor supports."""
    ask = ctypes.CDLL(str(FOLDER / "ov3_portable.so")).ov3_best_isa
    ask.restype = ctypes.c_char_p
    return str(ask().decode())


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets that were built and run here, the narrowest first, the emulation before the rest; () without the kernels."""
    if not (FOLDER / "ov3_portable.so").is_file():
        return ()
    runs = ISAS[: ISAS.index(best_isa()) + 1]
    if "avx512_bf16" in runs:
        runs = (EMULATED, *runs)
    return tuple(isa for isa in runs if (FOLDER / f"ov3_{isa}.so").is_file())


def isa() -> str:
    """The instruction set in use. ValueError where OV3FAST_CPU_ISA names one that does not run here, RuntimeError without the kernels."""
    found = available_isas()
    if not found:
        raise RuntimeError(unavailable_reason())
    if _forced is None:
        return found[-1]
    if _forced not in found:
        raise ValueError(f"OV3FAST_CPU_ISA must be one of {', '.join(found)} on this machine, got {_forced!r}")
    return _forced


def forced_isa() -> str | None:
    """The instruction set that `use_isa` or OV3FAST_CPU_ISA names."""
    return _forced


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block, kernels of that instruction set are used."""
    global _forced
    before, _forced = _forced, name
    try:
        isa()
        yield
    finally:
        _forced = before


def unavailable_reason() -> str | None:
    """Why the backend can't run at all, or None."""
    if not available_isas():
        return "the CPU kernels were not built (pip install needs a C++ compiler)"
    return None


def unsupported_reason(*operands: Tensor | torch.dtype | None) -> str | None:
    """Why the kernels can't take these operands, or None: they take float32 and bfloat16 (and int64) on the CPU."""
    for operand in operands:
        if operand is None:
            continue
        if isinstance(operand, Tensor) and not operand.is_cpu:
            return f"it does not run on {operand.device.type}"
        dtype = operand.dtype if isinstance(operand, Tensor) else operand
        if dtype not in _SUFFIX and dtype != torch.int64:
            return f"it does not take {dtype}"
    return None


def register(
    op: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    operands: tuple[str, ...],
    unsupported_reason: Callable[..., str | None] = unsupported_reason,
    plan: bool = True,
    **choice: Any,
) -> None:
    """Registers the backend "cpu" of `op`. plan: whether its functions may be replaced by plans of what they do; see plan.py.
    choice: what `_choice.by_evidence` returns, which hands calls to faster backends."""
    _dispatch.register(
        op, "cpu", forward, backward, operands=operands, unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason,
        of_one_kind=_planned if plan else None, **choice,
    )  # fmt: skip


def _planned(function: Callable[..., Any]) -> Callable[..., Any]:
    from .plan import Planned

    return Planned(function)


_PLAIN = frozenset({int, float, bool, type(None)})
"""What ctypes converts by itself."""


listener: Callable[[Callable[..., int], tuple[Any, ...]], None] | None = None
"""Is told of every call of a kernel: the function and its arguments. See plan.py."""


class Refused(ValueError):
    """A kernel doesn't take these values, and has written none. The operator says why."""


REFUSED = 2
"""What such a kernel returns."""


class Kernel:
    """A kernel of csrc/cpu as Python declares it: its name and its parameters in C++ syntax.

    "T* x, int64_t x_stride, double eps": T is the dtype of a call, P that of its parameters; bool and int travel as int64_t, and the number
    of threads, which comes last, is not in the list. T and P are float or bf16, P being T's or float (`mixed`).
    """

    def __init__(self, name: str, parameters: str, *, mixed: bool = False, dtypes: tuple[torch.dtype, ...] = tuple(_SUFFIX)):
        self.name = name
        self._types = [parameter.split()[0] for parameter in parameters.split(",")] + ["int64_t"]
        self._argtypes = [_C_TYPES.get(kind, ctypes.c_void_p) for kind in self._types]
        pairs = [(dtype, dtype) for dtype in dtypes]
        self.variants = [*pairs, (torch.bfloat16, torch.float32)] if mixed else pairs
        self._functions: dict[tuple[torch.dtype, torch.dtype, str | None], Any] = {}
        KERNELS[name] = self

    def __call__(self, dtype: torch.dtype, *arguments: Any, parameters: torch.dtype | None = None) -> None:
        """Runs the kernel for elements of `dtype`, with parameters of that or the given dtype. Tensors are passed as pointers, None as null."""
        key = (dtype, parameters or dtype, _forced)
        function = self._functions.get(key)
        if function is None:
            address = self._export(_library(isa()), *key[:2]).function
            function = self._functions[key] = ctypes.CFUNCTYPE(ctypes.c_int, *self._argtypes)(address)
        if listener is not None:
            listener(function, arguments)
        values = [value if type(value) in _PLAIN else value.data_ptr() for value in arguments]
        failed = function(*values, torch.get_num_threads())
        if failed:
            raise Refused(self.name) if failed == REFUSED else MemoryError(f"{self.name}: no memory for its work space")

    def check(self, library: ctypes.CDLL) -> None:
        """RuntimeError unless the library exports this kernel with these types."""
        for dtype, parameters in self.variants:
            try:
                found = self._export(library, dtype, parameters).signature.decode()
            except AttributeError:
                found = "no such kernel"
            expected = self.signature(dtype, parameters)
            if found != expected:
                raise RuntimeError(
                    f"the CPU kernel {self.name} is declared with ({expected}), and {library._name} has ({found}):"
                    " it was built from other sources; run `python csrc/build.py ov3fast/_native`, or install again"
                )

    def signature(self, dtype: torch.dtype, parameters: torch.dtype) -> str:
        """The types of the arguments, as csrc/cpu/export.h writes them."""
        names = {"T": _C_NAME[dtype], "P": _C_NAME[parameters]}
        return " ".join(names.get(kind.rstrip("*"), kind.rstrip("*")) + "*" * kind.count("*") for kind in self._types)

    def _export(self, library: ctypes.CDLL, dtype: torch.dtype, parameters: torch.dtype) -> Any:
        suffix = _SUFFIX[dtype] if parameters == dtype else f"{_SUFFIX[dtype]}_{_SUFFIX[parameters]}"
        get = library[f"ov3_export_{self.name}_{suffix}"]
        get.restype = ctypes.POINTER(_Export)
        return get().contents


class _Export(ctypes.Structure):
    _fields_ = (("signature", ctypes.c_char_p), ("function", ctypes.c_void_p))


KERNELS: dict[str, Kernel] = {}
"""Every declaration, by the kernel's name."""


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(FOLDER / f"ov3_{name}.so"))
    for kernel in KERNELS.values():
        kernel.check(library)
    return library


# Small calls are bound by host time: a view costs about 1.5 us, reading a tensor's layout 0.1 us.


def unit_stride(x: Tensor) -> Tensor:
    """x with a contiguous last axis; copies only if it has none."""
    return x if x.is_contiguous() or x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """[..., K] -> [R, K] with a contiguous last axis; copies only if the layout requires it."""
    return unit_stride(x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def matrix(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`rows` as a kernel takes them: the tensor, its row stride in elements, R and K."""
    if x.is_contiguous():
        width = x.shape[-1]
        return x, width, x.numel() // max(width, 1), width
    x = rows(x)
    return x, x.stride(0), *x.shape


NO_ROWS = None, 0, 0, 0
"""`matrix` of an absent tensor."""


Optional = TypeVar("Optional", Tensor, None, Tensor | None)


def dense(x: Optional) -> Optional:
    """An optional small tensor, contiguous."""
    return None if x is None else x.contiguous()


def wide(x: Optional) -> Optional:
    """A small parameter (a bias, a weight per channel) as contiguous float32."""
    if x is None or x.dtype == torch.float32:
        return dense(x)
    return x.to(torch.float32).contiguous()


def empty_like(x: Tensor, needed: bool = True) -> Tensor:
    """An uninitialised contiguous tensor of x's shape and dtype; an empty one if it isn't needed."""
    if not needed:
        return x.new_empty(0)
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def empty(like: Tensor, shape: Any, needed: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of like's dtype or the one given; an empty one if it isn't needed."""
    shape = tuple(shape) if needed else (0,)
    return like.new_empty_strided(shape, contiguous_strides(shape), dtype=dtype)  # half of new_empty's time


@functools.lru_cache(4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def pointer(tensor: Tensor | None, needed: bool) -> Tensor | None:
    """The tensor, or None (null in C++: don't compute it) if it isn't needed."""
    return tensor if needed else None
