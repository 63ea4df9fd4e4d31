"""NVIDIA's driver, libcuda, through ctypes, for what PyTorch does not expose."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, NoReturn


@functools.cache
def library() -> ctypes.CDLL:
    """Loads libcuda. Raises OSError if there is no driver."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """Calls a driver function. Raises RuntimeError with the driver's message if it fails."""
    error = getattr(library(), name)(*arguments)
    if error:
        refuse(name, error)


def refuse(name: str, error: int) -> NoReturn:
    """Raises RuntimeError with the driver's message for an error code."""
    words = ctypes.c_char_p()
    library().cuGetErrorString(error, ctypes.byref(words))
    raise RuntimeError(f"{name}: {(words.value or b'unknown error').decode()} ({error})")


@functools.cache
def context(device: int) -> ctypes.c_void_p:
    """The device's primary context, which PyTorch uses too; never released, as in PyTorch."""
    handle, found = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
    call("cuDevicePrimaryCtxRetain", ctypes.byref(found), handle)
    return found


def ensure_context(device: int) -> None:
    """Makes the device's context current in a thread that has none."""
    found = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(found))
    if not found.value:
        call("cuCtxSetCurrent", context(device))


@functools.cache
def version() -> int:
    """The newest CUDA version that the driver supports: 13000 for 13.0."""
    number = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(number))
    return number.value
