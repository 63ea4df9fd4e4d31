"""The Triton backend: kernels of `ov3fast.kernels`, imported at an operator's first call, so that `import ov3fast` stays light.

They run on CUDA and ROCm tensors; with TRITON_INTERPRET=1 (set before Triton is imported) Triton's interpreter runs them on CPU tensors, for
tests. Each operator's file here registers `launch`ers of its kernels' file under the contract of its reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def missing() -> str | None:
    """Why the backend can't run at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def refuses(*tensors: Tensor | None) -> str | None:
    """Why the kernels can't take these tensors, or None: float32, bfloat16 and float16 (and int64) on a GPU."""
    device = "cpu" if INTERPRETED else "cuda"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"it does not run on {tensor.device.type}"
        if tensor.dtype not in DTYPES and tensor.dtype != torch.int64:
            return f"it does not take {tensor.dtype}"
    return None


def launch(module: str, function: str) -> Callable[..., Any]:
    """`function` of `ov3fast.kernels.<module>`, imported at the first call, on its first tensor's device: Triton launches on the current one."""

    def call(*args: Any) -> Any:
        run = getattr(importlib.import_module(f"ov3fast.kernels.{module}"), function)
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            return run(*args)

    return call


def unless_empty(kernels: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """`kernels`, but `eager` for a call with an empty tensor: no kernel has code for one."""

    def call(*args: Any) -> Any:
        empty = any(isinstance(arg, Tensor) and arg.numel() == 0 for arg in args)
        return (eager if empty else kernels)(*args)

    return call


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
