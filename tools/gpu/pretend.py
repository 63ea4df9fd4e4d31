"""A pretended NVIDIA GPU: launchers run on fake tensors, and their launches are recorded instead of executed.

Finds errors between an operator's call and the compiler that would occur with CUDA tensors, and every specialisation that Triton
would compile there, which `precompile` can then compile on all cores.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib import cuda_driver
from ov3fast.kernels.lib import launch as launches
from ov3fast.ops import _check, _dispatch
from ov3fast.ops import triton as triton_backend

CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
DEVICE = 1
"""The tensors' device, of two, so that launches that wrongly go to the current device, 0, are noticed."""


@dataclass(frozen=True)
class Launch:
    kernel: str
    device: int
    """The device that was current at the launch, which Triton launches on."""
    grid: tuple[int, ...]


@dataclass
class Record:
    """The launches, and what would be compiled for them: specialisation -> kernel."""

    launches: list[Launch] = field(default_factory=list)
    specialisations: dict[str, JITFunction] = field(default_factory=dict)


class _Driver:
    """Triton's active driver."""

    def __init__(self, target: GPUTarget, current: Callable[[], int]):
        self.target, self.current = target, current

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.current()

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.get_current_device())


class _Pointer:
    """A fake tensor as seen by Triton's specialisation: a dtype, and an address as from an allocator (16-byte aligned if the offset is)."""

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self.address = 2**20 + tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


class _Launchers(TorchDispatchMode):
    """Within the block our operators run their launchers rather than the fake implementations registered for fake tensors."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "ov3fast":
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(self._as_fake, (args, kwargs or {}))
        return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)

    def _as_fake(self, value: Any) -> Any:
        return self.fake.from_tensor(value) if isinstance(value, Tensor) else value


@contextmanager
def driver(target: str = "sm_90", current: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Within the block Triton compiles for that architecture; `current` returns the index of the current device."""
    major, minor = CAPABILITIES[target]
    active = _Driver(GPUTarget("cuda", 10 * major + minor, 32), current)
    with mock.patch.object(triton.runtime.driver, "_active", active):
        yield


@contextmanager
def gpu(target: str = "sm_90", compiles: bool = False) -> Iterator[Record]:
    """Within the block operators run on a pretended GPU of that architecture, one of two; nothing is computed or launched.

    `compiles`: compile instead of recording what to compile.
    """
    record, current, kernels = Record(), [0], set()
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        pointers = [_Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args]
        named = {name: _Pointer(arg) if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        kernels.add(self)
        launch(self, *pointers, grid=grid, warmup=True, **named)
        grid = tuple(grid({**dict(zip(self.arg_names, args, strict=False)), **kwargs}) if callable(grid) else grid)
        if not all(size > 0 for size in grid):
            raise AssertionError(f"{self.__name__}: an empty grid, {grid}")
        record.launches.append(Launch(self.__name__, current[0], grid))

    def written_down(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        record.specialisations[compile["specialization_data"]] = fn.jit_function
        return not compiles

    def exchange(device: int) -> int:
        if device < 0:
            return -1
        before, current[0] = current[0], device
        return before

    capability = CAPABILITIES[target]
    # To PyTorch the fake tensors are on the CPU, since autograd and indexing would need a CUDA runtime otherwise; only Python sees a CUDA device.
    tensors = {
        "is_cuda": property(lambda tensor: True),
        "get_device": lambda tensor: DEVICE,
        "__bool__": lambda tensor: True,  # launchers only test data for validity
    }
    there = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: current[0],
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: f"pretended {target}",
        "synchronize": lambda device=None: None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
    }
    caches = (triton_backend.unavailable_reason, configs._there_is_a_gpu, configs._architecture, configs._tuned_for)
    with ExitStack() as stack:
        for name, value in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in tensors.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, value, create=True))
        stack.enter_context(mock.patch.object(triton_backend, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(cuda_driver, "version", lambda: 13000))
        # It rejects float16 on the CPU, where these tensors seem to be.
        stack.enter_context(mock.patch.object(_check, "tensor", lambda *_, **__: None))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", written_down))
        for cached in caches:
            stack.callback(cached.cache_clear)
            cached.cache_clear()
        stack.callback(_dispatch.forget_choices)
        _dispatch.forget_choices()
        stack.enter_context(driver(target, lambda: current[0]))
        stack.callback(lambda: [kernel.device_caches.clear() for kernel in kernels])
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Launchers(fake))
        yield record


class _Binaries:
    """Triton's utilities: every binary loads, and its handle is a number."""

    def __init__(self) -> None:
        self.functions: list[str] = []

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.functions.append(name)
        return 1, len(self.functions), 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


class _Library:
    """A libcuda whose calls all succeed and do nothing; launches call a C function, to cost what a call costs."""

    def __init__(self, launch: Callable[..., int] | None):
        # A cheap C function that returns 0.
        self.cuLaunchKernel = launch or ctypes.CDLL("libm.so.6").fegetexcept

    def cuCtxGetCurrent(self, found: Any) -> int:  # noqa: N802
        found._obj.value = 1
        return 0


@contextmanager
def host(target: str = "sm_90", launch: Callable[..., int] | None = None) -> Iterator[list[str]]:
    """Within the block the Triton backend treats CPU tensors as a GPU's. Kernels are compiled, and everything except the driver calls runs.

    For measuring host time. `launch` replaces cuLaunchKernel. Yields the names of the loaded functions, whose handles count from 1.
    """
    library, current = _Library(launch), _Driver(GPUTarget("cuda", 10 * CAPABILITIES[target][0], 32), lambda: 0)
    current.utils = _Binaries()
    current.launcher_cls = lambda source, metadata: lambda *arguments: None
    caches = (triton_backend.unavailable_reason, configs._there_is_a_gpu, configs._architecture, configs._tuned_for)
    with ExitStack() as stack:
        there = {
            "is_available": lambda: True, "current_device": lambda: 0,
            "get_device_capability": lambda device=None: CAPABILITIES[target], "get_device_name": lambda device=None: f"pretended {target}",
        }  # fmt: skip
        for name, value in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(triton_backend, "INTERPRETED", True))
        stack.enter_context(mock.patch.object(cuda_driver, "version", lambda: 13000))
        stack.enter_context(mock.patch.object(cuda_driver, "library", lambda: library))
        stack.enter_context(mock.patch.object(launches, "_rooms", launches._Rooms()))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", current))
        stack.callback(gc.collect)  # compiled kernels in plans, which are cycles, ask the driver to unload them
        for forget in (*(cached.cache_clear for cached in caches), _dispatch.forget_choices):
            stack.callback(forget)
            forget()
        stack.callback(lambda: [kernel.forget() for kernel in launches.KERNELS])
        yield current.utils.functions
