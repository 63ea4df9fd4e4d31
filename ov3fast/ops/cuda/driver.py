"""Loads fat binaries and launches their kernels through NVIDIA's driver, libcuda, by ctypes.

A launch is a stream operation like any other: nothing waits, nothing is allocated, and CUDA graphs capture it. A binary is loaded at its first
launch on a device; that one must not be captured (warm up before, as graphs need anyway).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ov3fast.kernels.lib.cuda_driver import call, context, version

from . import FOLDER, THREADS, Launch, Struct

__all__ = ["run", "version"]


def run(launches: list[Launch], device: torch.device) -> None:
    """Launches one after the other on the current stream of `device`. RuntimeError with the driver's words where it refuses."""
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    # The thread may have no context yet (autograd's threads), or another device's.
    call("cuCtxPushCurrent_v2", context(device.index))
    try:
        for launch in launches:
            _launch(launch, device.index, stream)
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def _launch(launch: Launch, device: int, stream: ctypes.c_void_p) -> None:
    values = [_to_c(value) for _, value in launch.arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    call(
        "cuLaunchKernel", _function(launch.binary, launch.kernel, device),
        *map(ctypes.c_uint, (*launch.grid, 1, THREADS, 1, 1, 0)), stream, addresses, None,
    )  # fmt: skip


def _to_c(value: Any) -> Any:
    if isinstance(value, Struct):
        encoded = value.encode()
        return ctypes.create_string_buffer(encoded, len(encoded))
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    # The driver takes the first bytes of an int64_t where the kernel has an int32_t.
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


@functools.cache
def _module(binary: str, device: int) -> ctypes.c_void_p:
    """Needs the device's context to be current."""
    module = ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), (FOLDER / f"{binary}.fatbin").read_bytes())
    return module


@functools.cache
def _function(binary: str, kernel: str, device: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    call("cuModuleGetFunction", ctypes.byref(function), _module(binary, device), kernel.encode())
    return function
