"""Launches of Triton kernels at a few microseconds each.

Triton binds, specialises and looks up a kernel anew at every launch, which takes the host longer than a small kernel takes the GPU. Here what
the choice of the compiled code depends on is the key under which it is kept: the types of the arguments, dtypes, whether addresses are multiples
of 16 bytes, integers, constexprs and options, the device. Triton compiles and makes the first launch of each key; the later ones write the
arguments into a record and hand it to NVIDIA's driver. What only Triton launches (clusters, scratch memory, tensor descriptors, hooks, ROCm) stays
with it, and OV3FAST_LAUNCHER=triton leaves everything to it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import cuda_driver
from .common import INTERPRETED

OURS = os.environ.get("OV3FAST_LAUNCHER", "ov3fast") != "triton" and not torch.version.hip

LARGEST_RECORD = 4096
"""Bytes of a kernel's parameters, at most."""
MOST_KEYS = 4096
FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}
"""Triton's types -> struct's; a pointer's is P."""

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({int, bool, str, type(None)})
KERNELS: list[Kernel] = []
"""All that launchers call, of the modules that were imported."""

_address, _dtype = Tensor.data_ptr, attrgetter("dtype")
listener: Callable[[_Launch | None, tuple[int, ...], Sequence[Any]], None] | None = None
"""Is told of every launch: how ours does it (None where only Triton can), its grid and its arguments. See plan.py."""


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit` for the kernels that launchers call."""
    if function is None:
        return functools.partial(kernel, **options)
    return triton.jit(function, **options) if INTERPRETED else Kernel(function, **options)


class Kernel(JITFunction):  # type: ignore[misc]  # Triton has no types
    """A Triton kernel that remembers how it was launched."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        super().__init__(function, **options)
        self._calls: dict[tuple[Any, ...], _Call | None] = {}
        KERNELS.append(self)

    def forget(self) -> None:
        """What was compiled and launched, as if this were the first call."""
        self._calls.clear()
        self.device_caches.clear()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self._start, grid)

    # Host time counts below: each line is a tenth of a microsecond or several.

    def _start(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
        kinds = (*map(type, args), *constants)
        call = self._calls.get(kinds)
        if call is None:
            if kinds not in self._calls:
                self._calls[kinds] = call = _call_of(tuple(map(type, args)))
            if call is None:
                if listener is not None:
                    listener(None, grid, args)
                return self.run(*args, grid=grid, warmup=False, **constants)
        tensors = call.tensors(args)
        addresses = tuple(map(_address, tensors))
        device = tensors[0].get_device()
        alignment = tuple([address % 16 for address in addresses])
        key = device, call.values(args), tuple(map(_dtype, tensors)), alignment, *constants.values()
        launch = call.launches.get(key)
        if launch is None or is_watched():
            compiled = self.run(*args, grid=grid, warmup=False, **constants)
            if launch is None and compiled is not None:
                call.remember(key, compiled)
            if listener is not None:
                listener(call.launches.get(key), grid, args)
            return compiled
        x, y, z = (*grid, 1, 1)[:3]
        if not (x and y and z):
            return launch.compiled
        if listener is not None:
            listener(launch, grid, args)
        room = _rooms.of.get(device) or _rooms.make(device)
        # Last come two pointers to scratch memory, which these kernels don't use.
        launch.pack(room.record, 0, *launch.taken(addresses + args), 0, 0)
        room.size.value = launch.size
        stream = ctypes.c_void_p(_driver.active.get_current_stream(device))
        error = room.launch(launch.function, x, y, z, launch.threads, 1, 1, launch.shared, stream, None, room.extra)
        if error:
            cuda_driver.refuse("cuLaunchKernel", error)
        return launch.compiled


class _Call:
    """Calls whose arguments are of the same types, and whose constants have the same names."""

    def __init__(self, types: Sequence[type]):
        self.types, self.places = types, [i for i, kind in enumerate(types) if kind in _TENSORS]
        self.tensors = taker(self.places)
        self.values = taker([i for i, kind in enumerate(types) if kind in _VALUES])
        self.launches: dict[tuple[Any, ...], _Launch] = {}
        self._made: dict[Any, _Launch | None] = {}

    def remember(self, key: tuple[Any, ...], compiled: Any) -> None:
        if compiled not in self._made:
            self._made[compiled] = _launch_of(compiled, self)
        launch = self._made[compiled]
        if launch is not None and OURS:
            if len(self.launches) >= MOST_KEYS:
                self.launches.clear()
            self.launches[key] = launch


def _call_of(types: tuple[type, ...]) -> _Call | None:
    """None for arguments of which the key would not know enough."""
    known = all(kind in _TENSORS or kind in _VALUES or kind is float for kind in types)
    return _Call(types) if known and _TENSORS.intersection(types) else None


class _Launch:
    """A compiled kernel on one device, and how the driver gets its arguments.

    arguments: positions of those that the record holds; places: theirs in (*addresses of the tensors, *arguments); layout: as struct
    writes them.
    """

    def __init__(self, compiled: Any, arguments: Sequence[int], places: Sequence[int], layout: str):
        self.compiled = compiled  # whose end would unload the function
        self.function = ctypes.c_void_p(compiled.function)
        warps, _, self.shared = compiled.packed_metadata
        self.threads, self.arguments = 32 * warps, arguments
        self.pack, self.size, self.taken = struct.Struct(layout).pack_into, struct.calcsize(layout), taker(places)


def _launch_of(compiled: Any, call: _Call) -> _Launch | None:
    """None for what is left to Triton."""
    metadata = compiled.metadata
    warps, clusters, shared = compiled.packed_metadata
    if clusters != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl or shared > 227 * 1024:
        return None
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return None
    arguments, places, layout = [], [], ""
    for place, kind in enumerate(list(compiled.src.signature.values())[: len(call.types)]):
        if kind == "constexpr":
            if call.types[place] is float:  # whose value the key does not hold
                return None
        elif kind.startswith("*") or kind in FORMATS:
            arguments.append(place)
            places.append(call.places.index(place) if kind.startswith("*") else len(call.places) + place)
            layout += FORMATS.get(kind, "P")
        else:
            return None
    layout += "PP"
    sizes = [8 * struct.calcsize(letter) for letter in layout]
    if parameter_sizes(compiled.asm["ptx"]) != sizes or struct.calcsize(layout) > LARGEST_RECORD:
        return None
    return _Launch(compiled, arguments, places, layout)


def parameter_sizes(ptx: str) -> list[int]:
    """Bits of each parameter of a module's kernel."""
    head = ptx[ptx.index(".entry") :]
    return [int(bits) for bits in re.findall(r"\.param \.[a-z](\d+)\b", head[: head.index("{")])]


def taker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the values at `places` out of a sequence, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


_runtime, _driver = triton.knobs.runtime, triton.runtime.driver
_entered, _left = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook


def is_watched() -> bool:
    """Whether something waits for Triton to tell of launches."""
    ours = _runtime.launch_enter_hook is _entered and _runtime.launch_exit_hook is _left
    return not ours or bool(_entered.calls or _left.calls)


class _Room:
    """Where a thread writes the arguments of a launch; the driver copies them before it returns."""

    def __init__(self) -> None:
        self.record, self.size = ctypes.create_string_buffer(LARGEST_RECORD), ctypes.c_size_t()
        # CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END.
        self.extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(self.record), 2, ctypes.addressof(self.size), 0)
        self.launch = cuda_driver.library().cuLaunchKernel


class _Rooms(threading.local):
    """One per thread and device. A thread that PyTorch did not yet use may have no context."""

    def __init__(self) -> None:
        self.of: dict[int, _Room] = {}

    def make(self, device: int) -> _Room:
        cuda_driver.ensure_context(device)
        room = self.of[device] = _Room()
        return room


_rooms = _Rooms()


def rooms() -> _Rooms:
    return _rooms


def stream_of() -> Callable[[int], int]:
    """What tells a device's current stream."""
    found: Callable[[int], int] = _driver.active.get_current_stream
    return found
