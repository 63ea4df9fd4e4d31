"""The CUDA backend: C++ kernels of csrc/cuda, compiled to one fat binary per operator when the package was installed.

They are launched through the driver's C interface (driver.py), so neither the binaries nor the wheel depend on PyTorch's headers or version. An
operator's file here lays out its arguments as `Launch`es; `executed_by` hands these to an emulator in place of a GPU, for tests.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pkgutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch

FOLDER = Path(os.environ.get("OV3FAST_NATIVE") or Path(__file__).parents[2] / "_native")
"""Where the fat binaries lie, beside the CPU kernels' libraries."""

THREADS = 256
"""Threads per block, as in csrc/cuda/vectors.h."""

FORMATS = {"ptr": "Q", "i32": "i", "i64": "q", "f32": "f"}
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

Field = tuple[str, Any] | tuple[str, Any, int]


class Struct:
    """A struct that a kernel takes by value: fields (kind, value), or (kind, values, length) for an array that zeros fill up.

    kind is one of FORMATS; a "ptr" is a tensor or None. Each field is aligned to its size.
    """

    def __init__(self, *fields: Field):
        self.fields = fields

    def encode(self) -> bytes:
        out = bytearray()
        for kind, value, *length in self.fields:
            values = list(value) if length else [value]
            if length and len(values) > length[0]:
                raise ValueError(f"{len(values)} values for an array of {length[0]}")
            if kind == "ptr":
                values = [0 if v is None else v.data_ptr() for v in values]
            width = struct.calcsize(FORMATS[kind])
            out += bytes(-len(out) % width)
            out += struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
            out += bytes(width * (length[0] - len(values)) if length else 0)
        return bytes(out) + bytes(-len(out) % max(struct.calcsize(FORMATS[field[0]]) for field in self.fields))


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel of csrc/cuda/<binary>.cu, in blocks of THREADS."""

    binary: str
    kernel: str
    grid: tuple[int, int]
    arguments: tuple[tuple[str, Any], ...]
    """In order: (name, value) with a tensor (its address), None (null), a Struct, an int (int32_t or int64_t) or a float (float)."""


_execute: Callable[[Launch], Any] | None = None


@contextmanager
def executed_by(execute: Callable[[Launch], Any]) -> Iterator[None]:
    """Within the block the backend takes CPU tensors, and `execute` gets its launches."""
    global _execute
    before, _execute = _execute, execute
    _dispatch.forget_choices()
    try:
        yield
    finally:
        _execute = before
        _dispatch.forget_choices()


def unavailable_reason() -> str | None:
    """Why the backend can't run at all, or None."""
    return None if _execute is not None else _obstacle()


@functools.cache
def _obstacle() -> str | None:
    build = build_notes()
    if build is None:
        return "the CUDA kernels were not built (pip install needs nvcc and an NVIDIA driver, or OV3FAST_CUDA=1)"
    if torch.version.hip or not torch.cuda.is_available():
        return "there is no GPU" if not torch.version.hip else "it runs on NVIDIA GPUs alone"
    from . import driver

    if (version := driver.version() // 1000) < build["toolkit"][0]:
        return f"the CUDA kernels were built by CUDA {'.'.join(map(str, build['toolkit']))}, the driver is for CUDA {version}"
    oldest = min(build["architectures"])
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < oldest:
            return f"the CUDA kernels were built for sm_{oldest} and later, GPU {device} is of sm_{major}{minor}"
    return None


def build_notes() -> dict[str, Any] | None:
    """What csrc/build.py noted about the build: "toolkit" (major, minor) and "architectures"; None without one."""
    file = FOLDER / "cuda.json"
    return json.loads(file.read_text()) if file.is_file() else None


def unsupported_reason(*tensors: Tensor | None) -> str | None:
    """Why the kernels can't take these tensors, or None: they take float32, bfloat16 and float16 on NVIDIA GPUs."""
    device = "cuda" if _execute is None else "cpu"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"it does not run on {tensor.device.type}"
        if tensor.dtype not in SUFFIX:
            return f"it does not take {tensor.dtype}"
    return None


def run(launches: list[Launch], device: torch.device) -> None:
    """Launches one after the other on the current stream of `device`."""
    if _execute is not None:
        for launch in launches:
            _execute(launch)
        return
    from . import driver

    driver.run(launches, device)


for _module in pkgutil.iter_modules(__path__):
    if _module.name != "driver":
        importlib.import_module(f"{__name__}.{_module.name}")
