"""NVIDIA's driver, libcuda, by ctypes: what PyTorch does not tell about it. Nothing here creates a context."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


@functools.cache
def library() -> ctypes.CDLL:
    """OSError where there is no driver."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """RuntimeError in the driver's words where it refuses."""
    error = getattr(library(), name)(*arguments)
    if error:
        words = ctypes.c_char_p()
        library().cuGetErrorString(error, ctypes.byref(words))
        raise RuntimeError(f"{name}: {(words.value or b'unknown error').decode()} ({error})")


@functools.cache
def version() -> int:
    """The newest CUDA that the driver runs: 13000 for 13.0."""
    number = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(number))
    return number.value
