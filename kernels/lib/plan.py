"""Records the work of a launcher for one kind of call, and replays it without the host-side computation.

A launcher (`forward` or `backward` in a kernel's file) computes layouts, grids and configurations, and requests memory, views, products and
launches. Calls that differ only in addresses and values make the same requests every time. `Planned` passes the first call through,
records the requests of the second, and generates a Python function that has no decisions left:

    def plan(x, weight, bias):
        if <not the recorded kind>: return launcher(x, weight, bias)
        t0 = empty_strided((8, 64), (64, 1), dtype=c0, device=c1)
        pack0(record, 0, x.data_ptr(), 8, weight.data_ptr(), t0.data_ptr(), ...)
        launch(c2, 4, 1, 1, ...)
        return t0

PyTorch operations are recorded by a dispatch mode, which misses none, and launches by launch.listener. If something can't be recorded (a value read
back to the host, a launch by Triton), the launcher is used unchanged.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import config as configs
from . import cuda_driver
from . import launch as launches
from .common import INTERPRETED

ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
ALIGNMENT = 16
"""In bytes. Triton specialises on addresses that are multiples of this, which allocators guarantee."""

MOST_STEPS = 64
"""Most steps of a plan; longer calls are bound by the device, not the host."""
BINDINGS = {
    "addmm": torch.addmm, "clone": torch.clone, "linear": torch.nn.functional.linear, "matmul": torch.matmul, "mm": torch.mm, "zero_": torch.zero_,
}  # fmt: skip
"""Operations with a Python binding that takes the same arguments and costs less than the operation object."""

_noting = threading.Lock()


def planned(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `launcher` with plans; not in the interpreter, which launches nothing that could be recorded."""
    return launcher if INTERPRETED else Planned(launcher)


class Planned:
    """`launcher`, with a plan for calls whose tensors agree in dtype, device, shape and strides and whose non-float arguments are equal."""

    def __init__(self, launcher: Callable[..., Any]):
        self.launcher = launcher
        self.run: Callable[..., Any] = self._first

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def _first(self, *args: Any) -> Any:
        """Compiles and fills caches."""
        self.run = self._second
        return self.launcher(*args)

    def _second(self, *args: Any) -> Any:
        if not _can_be_noted(args) or not _noting.acquire(blocking=False):
            return self.launcher(*args)
        try:
            notes = _Notes(args)
            result = notes.run(self.launcher)
        finally:
            _noting.release()
        try:
            self.run = _Writer(notes, result, self._otherwise).function()
        except NotPlannable:
            self.run = self.launcher
        return result

    def _otherwise(self, *args: Any) -> Any:
        """A call that the plan does not apply to. If the configurations have changed, the plan is made again."""
        if configs.generation >= 0 and configs.generation != getattr(self.run, "generation", configs.generation):
            self.run = self._first
        return self.launcher(*args)


class NotPlannable(Exception):
    """The recorded requests can't be replayed without the launcher."""


def _can_be_noted(args: Sequence[Any]) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    here = all(tensor.get_device() < 0 or tensor.get_device() == torch.cuda.current_device() for tensor in tensors)
    aligned = all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
    return bool(tensors) and here and aligned and configs.generation >= 0 and launches.OURS and not launches.is_watched()


class _Known:
    """A tensor of a call: an argument, or the result of a PyTorch operation.

    root: for a view, the base tensor that owns its memory; offset: bytes from the base's first element to the view's.
    """

    def __init__(self, tensor: Tensor, name: str, root: _Known | None = None):
        self.tensor, self.name = tensor, name
        self.root = root or self
        self.offset = 0
        if root is not None and tensor.numel() and root.tensor.numel():
            self.offset = tensor.data_ptr() - root.tensor.data_ptr()
        self.is_argument = self.is_allocated = False
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()


class _Notes(TorchDispatchMode):
    """The recording of one call: its steps in order, and every tensor involved."""

    def __init__(self, args: Sequence[Any]):
        super().__init__()
        # Each argument as a separate tensor: one passed twice counts as two.
        self.args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        self.thread = threading.get_ident()
        self.known: dict[int, _Known] = {}
        self.steps: list[tuple[str, Any]] = []
        for i, arg in enumerate(self.args):
            if isinstance(arg, Tensor):
                self._meet(arg, f"a{i}").is_argument = True

    def _meet(self, tensor: Tensor, name: str | None = None, root: _Known | None = None) -> _Known:
        known = self.known[id(tensor)] = _Known(tensor, name or f"t{len(self.known)}", root)
        return known

    def run(self, launcher: Callable[..., Any]) -> Any:
        launches.listener, before = self._launched, launches.listener
        try:
            # Below autograd, which would replace views with its own tensors.
            with torch._C._AutoDispatchBelowAutograd(), self:
                return launcher(*self.args)
        finally:
            launches.listener = before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        operands = [self.known[id(value)] for value in _tensors((args, kwargs)) if id(value) in self.known]
        fresh = []
        for value in _tensors(result):
            if id(value) not in self.known:
                whose = next((known.root for known in operands if _share_memory(value, known.tensor)), None)
                known = self._meet(value, root=whose)
                fresh += [known] if whose is None else []
        if name in ALLOCATIONS and len(fresh) == 1:
            fresh[0].is_allocated = True
            self.steps.append(("allocate", fresh[0]))
        elif fresh or function._schema.is_mutable or not _tensors(result):
            self.steps.append(("operate", (function, args, kwargs, result, fresh)))
        return result

    def _launched(self, launch: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        if threading.get_ident() == self.thread:
            self.steps.append(("launch", (launch, (*grid, 1, 1)[:3], args)))


class _Writer:
    """Turns a recording into the source of a function and its constants."""

    def __init__(self, notes: _Notes, result: Any, otherwise: Callable[..., Any]):
        self.notes, self.result, self.known = notes, result, notes.known
        self.lines: list[str] = []
        self.names: dict[str, Any] = {
            "otherwise": otherwise, "configs": configs, "is_watched": launches.is_watched, "empty_strided": torch.empty_strided,
            "current_device": torch.cuda.current_device, "rooms": launches.rooms(), "stream_of": launches.stream_of(),
            "pointer": ctypes.c_void_p, "refuse": cuda_driver.refuse,
        }  # fmt: skip
        self.pointed: dict[str, None] = {}
        """Arguments whose addresses the launches read."""
        self.views: list[_Known] = []
        """Tensors that the plan allocates."""

    def constant(self, value: Any) -> str:
        if value is None or type(value) in (bool, int):
            return repr(value)
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def value(self, value: Any) -> str:
        """The source of an operation's argument, or of part of the result."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{self.value(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        return self.constant(value)

    def tensor(self, tensor: Tensor) -> str:
        """The name of the variable for a tensor; creates a view if it is needed as a tensor."""
        known = self._find(tensor)
        root = known.root
        if known.offset == 0 and (known.shape, known.strides) == (root.shape, root.strides):
            return root.name
        if known not in self.views:
            self.lines.append(f"{known.name} = {self._view(known)}")
            self.views.append(known)
        return known.name

    def _find(self, tensor: Tensor) -> _Known:
        known = self.known.get(id(tensor))
        if known is None:
            raise NotPlannable("a tensor from elsewhere")
        return known

    def _view(self, known: _Known) -> str:
        root = known.root
        whole = known.offset == 0 and known.tensor.numel() == root.tensor.numel()
        if whole and len(root.shape) == 2 and (known.shape, known.strides) == (root.shape[::-1], root.strides[::-1]):
            return f"{root.name}.t()"
        if whole and root.tensor.is_contiguous():
            if known.tensor.is_contiguous():
                return f"{root.name}.view({_sizes(known.shape)})"
            if len(known.shape) == 2 and known.tensor.t().is_contiguous():
                shape = known.shape[::-1]
                matrices = (
                    view.name
                    for view in self.views
                    if view.root is root and view.shape == shape and view.tensor.is_contiguous()
                )
                return f"{next(matrices, f'{root.name}.view({_sizes(shape)})')}.t()"
        first = str(known.offset // known.tensor.element_size())
        if root.is_argument:
            first += f" + {root.name}.storage_offset()"
        return f"{root.name}.as_strided({known.shape}, {known.strides}, {first})"

    def address(self, tensor: Tensor) -> str:
        known = self._find(tensor)
        root = known.root
        if root.is_argument:
            self.pointed[root.name] = None
        return f"p_{root.name}" + (f" + {known.offset}" if known.offset else "")

    def function(self) -> Callable[..., Any]:
        if len(self.notes.steps) > MOST_STEPS:
            raise NotPlannable(f"{len(self.notes.steps)} steps")
        self._shape_results()
        for kind, what in self.notes.steps:
            getattr(self, f"_{kind}")(what)
        launched = any(kind == "launch" for kind, _ in self.notes.steps)
        self.lines.append(f"return {self.value(self.result)}")
        parameters = ", ".join(f"a{i}" for i in range(len(self.notes.args)))
        body = [*self._guards(parameters, launched), *self._freed()]
        source = f"def plan({parameters}):\n" + "".join(f"    {line}\n" for line in body)
        exec(compile(source, "<plan>", "exec"), self.names)
        plan: Callable[..., Any] = self.names["plan"]
        plan.source, plan.generation = source, configs.generation  # type: ignore[attr-defined]
        return plan

    def _shape_results(self) -> None:
        """Memory that only launches use and that is returned as a single full view is allocated in the view's shape."""
        operands = {id(v) for kind, what in self.notes.steps if kind == "operate" for v in _tensors(what[1:])}
        for value in _tensors(self.result):
            known = self._find(value)
            root = known.root
            whole = known.tensor.is_contiguous() and root.tensor.is_contiguous() and value.numel() == root.tensor.numel()
            others = [k for k in self.known.values() if k.root is root and k is not known]
            met = any(id(k.tensor) in operands for k in (*others, known)) or any(
                k.tensor is v for k in others for v in _tensors(self.result)
            )
            if root is not known and root.is_allocated and whole and not met:
                root.shape, root.strides = known.shape, known.strides

    def _guards(self, parameters: str, launched: bool) -> list[str]:
        """The condition under which a call differs from the recorded kind."""
        floats = [f"a{i} != {self.constant(arg)}" for i, arg in enumerate(self.notes.args) if isinstance(arg, float)]
        device = next(arg for arg in self.notes.args if isinstance(arg, Tensor)).get_device()
        here = [f"current_device() != {device}"] if device >= 0 else []
        watched = ["is_watched()"] if launched else []
        other = " or ".join([*floats, f"configs.generation != {configs.generation}", *here, *watched])
        lines = [f"if {other}: return otherwise({parameters})"]
        if self.pointed:
            lines += [f"p_{name} = {name}.data_ptr()" for name in self.pointed]
            addresses = " | ".join(f"p_{name}" for name in self.pointed)
            lines.append(f"if ({addresses}) & {ALIGNMENT - 1}: return otherwise({parameters})")
        if launched:
            lines += [
                f"room = rooms.of.get({device}) or rooms.make({device})",
                "record, size, extra, launch = room.record, room.size, room.extra, room.launch",
                f"stream = pointer(stream_of({device}))",
            ]
        return lines

    def _allocate(self, known: _Known) -> None:
        kind = known.tensor.dtype, known.tensor.device
        like = next(
            (i for i, arg in enumerate(self.notes.args) if isinstance(arg, Tensor) and (arg.dtype, arg.device) == kind), None
        )
        if like is None:
            dtype, device = self.constant(known.tensor.dtype), self.constant(known.tensor.device)
            made = f"empty_strided({known.shape}, {known.strides}, dtype={dtype}, device={device})"
        else:  # less time than to read a dtype and a device
            made = f"a{like}.new_empty_strided({known.shape}, {known.strides})"
        self.lines.append(f"{known.name} = {made}")
        self._points(known)

    def _points(self, known: _Known) -> None:
        """Emits code that reads the address of memory used by a launch."""
        if any(
            self.known[id(arg)].root is known
            for kind, what in self.notes.steps
            if kind == "launch"
            for arg in what[2]
            if isinstance(arg, Tensor) and id(arg) in self.known
        ):
            self.lines.append(f"p_{known.name} = {known.name}.data_ptr()")

    def _operate(self, what: Any) -> None:
        function, args, kwargs, result, fresh = what
        if function.namespace != "aten" or not (result is None or _tensors(result)):
            raise NotPlannable(f"{function}, or what it returns")
        values = [self.value(arg) for arg in args] + [f"{name}={self.value(arg)}" for name, arg in kwargs.items()]
        call = f"{self.constant(BINDINGS.get(function.overloadpacket.__name__, function))}({', '.join(values)})"
        if fresh and len(fresh) != len(_tensors(result)):
            raise NotPlannable(f"{function} returns views beside other tensors")
        self.lines.append(f"{', '.join(known.name for known in fresh)} = {call}" if fresh else call)
        for known in fresh:
            self._points(known)

    def _launch(self, what: Any) -> None:
        launch, (x, y, z), args = what
        if launch is None:
            raise NotPlannable("Triton's own launch")
        number = len(self.names)
        self.names |= {f"pack{number}": launch.pack, f"f{number}": launch.function, f"kept{number}": launch.compiled}
        values = [args[place] for place in launch.arguments]
        record = [self.address(value) if isinstance(value, Tensor) else self.constant(value) for value in values]
        self.lines += [
            f"pack{number}(record, 0, {', '.join(record)}, 0, 0)",
            f"size.value = {launch.size}",
            f"error = launch(f{number}, {x}, {y}, {z}, {launch.threads}, 1, 1, {launch.shared}, stream, None, extra)",
            "if error: refuse('cuLaunchKernel', error)",
        ]

    def _freed(self) -> list[str]:
        """The lines, with each tensor deleted after its last use, so that a loop keeps only one iteration's buffers."""
        last = {name: i for i, line in enumerate(self.lines) for name in re.findall(r"\b(?:p_)?(t\d+)\b", line)}
        ended: dict[int, list[str]] = {}
        for name, i in last.items():
            ended.setdefault(i, []).append(name)
        return [line for i, text in enumerate(self.lines) for line in (text, *self._end(i, ended))]

    def _end(self, i: int, ended: dict[int, list[str]]) -> list[str]:
        return [f"del {', '.join(ended[i])}"] if i in ended and i < len(self.lines) - 1 else []


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _sizes(shape: Sequence[int]) -> str:
    """The arguments of `view`, which takes integers in half the time of a tuple."""
    return ", ".join(map(str, shape)) or "()"


def _share_memory(a: Tensor, b: Tensor) -> bool:
    first = a.untyped_storage().data_ptr()
    return first != 0 and first == b.untyped_storage().data_ptr()
