"""Records the work of a launcher for one kind of call, and replays it without the host-side computation.

A launcher (an operator's forward or backward on a backend with kernels of ours) computes layouts and sizes, and requests memory, views, products
and launches. Calls that differ only in addresses and values make the same requests every time. `Planned` passes the first calls through,
records the requests of one, and generates a Python function that has no decisions left:

    def plan(x, weight, bias):
        if <not the recorded kind>: return launcher(x, weight, bias)
        t0 = x.new_empty_strided((8, 64), (64, 1))
        <launch with the addresses of x, weight and t0>
        return t0

PyTorch operations are recorded by a dispatch mode, which misses none, and launches by whatever launches them, which calls `Notes.launched`. If
something can't be recorded (a value read back to the host), the launcher is used unchanged. How a launch is written, and what else a plan depends
on, is each device's: kernels/lib/plan.py and ops/cpu/plan.py.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
MOST_STEPS = 160
"""Most steps of a plan; longer calls are bound by the device, not the host."""
LARGEST_PIECE, LARGEST_POOL = 2**20, 2**24
"""Bytes. Work space that only launches use is allocated together, since an allocation costs as much as a launch; larger pieces are freed one by one."""
PIECES_START_AT = 256
"""Bytes, a multiple of every alignment that kernels or copies ask for."""
BINDINGS: dict[str, Callable[..., Any]] = {
    "linear": torch.nn.functional.linear,
    **{
        name: getattr(torch, name, None) or getattr(Tensor, name)
        for name in (
            "_assert_async", "abs", "add", "add_", "addmm", "all", "amax", "clamp", "clamp_min", "clone", "copy_", "div", "eq", "exp", "exp2", "fill_", "frexp", "gt", "log_", "lt",
            "masked_fill", "matmul", "maximum", "mean", "mm", "mul", "ne", "neg", "new_full", "new_ones", "new_zeros", "ones_like", "reciprocal", "round",
            "stack", "sub", "sum", "to", "where", "zero_", "zeros_like",
        )
    },
}  # fmt: skip
"""Operations with a Python binding that takes the same arguments and costs less than the operation object."""

_noting = threading.Lock()


class Planned:
    """`launcher`, with a plan for calls whose tensors agree in dtype, device, shape and strides and whose non-float arguments are equal."""

    launches: Any
    """The module whose `listener` is told of every launch."""

    BEFORE = 1
    """Calls that pass before one is recorded: the first compiles and fills caches."""

    def __init__(self, launcher: Callable[..., Any]):
        self.launcher, self.passed = launcher, 0
        self.run: Callable[..., Any] = self._early

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def _early(self, *args: Any) -> Any:
        self.passed += 1
        if self.passed >= self.BEFORE:
            self.run = self._noted
        return self.launcher(*args)

    def _noted(self, *args: Any) -> Any:
        if not self.can_be_noted(args) or not _noting.acquire(blocking=False):
            return self.launcher(*args)
        try:
            notes = Notes(args)
            with self._listening(notes):
                result = notes.run(self.launcher)
        finally:
            _noting.release()
        try:
            self.run = self.writer(notes, result).function()
        except NotPlannable:
            self.run = self.launcher
        return result

    def can_be_noted(self, args: Sequence[Any]) -> bool:
        return any(isinstance(arg, Tensor) for arg in args)

    @contextmanager
    def _listening(self, notes: Notes) -> Iterator[None]:
        self.launches.listener, before = notes.launched, self.launches.listener
        try:
            yield
        finally:
            self.launches.listener = before

    def writer(self, notes: Notes, result: Any) -> Writer:
        raise NotImplementedError

    def otherwise(self, *args: Any) -> Any:
        """A call that the plan does not apply to."""
        return self.launcher(*args)


class NotPlannable(Exception):
    """The recorded requests can't be replayed without the launcher."""


class Known:
    """A tensor of a call: an argument, or the result of a PyTorch operation.

    root: for a view, the base tensor that owns its memory; offset: bytes from the base's first element to the view's.
    """

    def __init__(self, tensor: Tensor, name: str, root: Known | None = None):
        self.tensor, self.name = tensor, name
        self.root = root or self
        self.offset = 0
        if root is not None and tensor.numel() and root.tensor.numel():
            self.offset = tensor.data_ptr() - root.tensor.data_ptr()
        self.pool, self.place = self, 0
        """The piece whose allocation this one lies in, and the byte where it does."""
        self.is_argument = self.is_allocated = False
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        self.bytes = tensor.untyped_storage().nbytes()


class Notes(TorchDispatchMode):
    """The recording of one call: its steps in order, and every tensor involved."""

    def __init__(self, args: Sequence[Any]):
        super().__init__()
        # Each argument as a separate tensor: one passed twice counts as two.
        self.args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        self.thread = threading.get_ident()
        self.known: dict[int, Known] = {}
        self.steps: list[tuple[str, Any]] = []
        for i, arg in enumerate(self.args):
            if isinstance(arg, Tensor):
                self._meet(arg, f"a{i}").is_argument = True

    def _meet(self, tensor: Tensor, name: str | None = None, root: Known | None = None) -> Known:
        known = self.known[id(tensor)] = Known(tensor, name or f"t{len(self.known)}", root)
        return known

    def run(self, launcher: Callable[..., Any]) -> Any:
        # Below autograd, which would replace views with its own tensors.
        with torch._C._AutoDispatchBelowAutograd(), self:
            return launcher(*self.args)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        operands = [self.known[id(value)] for value in tensors_in((args, kwargs)) if id(value) in self.known]
        fresh = []
        for value in tensors_in(result):
            if id(value) not in self.known:
                whose = next((known.root for known in operands if _share_memory(value, known.tensor)), None)
                known = self._meet(value, root=whose)
                fresh += [known] if whose is None else []
        if name in ALLOCATIONS and len(fresh) == 1:
            fresh[0].is_allocated = True
            self.steps.append(("allocate", fresh[0]))
        elif fresh or function._schema.is_mutable or not tensors_in(result):
            self.steps.append(("operate", (function, args, kwargs, result, fresh)))
        return result

    def launched(self, launch: Any, *rest: Any) -> None:
        """rest: what the writer's `launch` takes; its last is the arguments of the kernel."""
        if threading.get_ident() == self.thread:
            self.steps.append(("launch", (launch, *rest)))


class Writer:
    """Turns a recording into the source of a function and its constants."""

    def __init__(self, notes: Notes, result: Any, otherwise: Callable[..., Any]):
        self.notes, self.result, self.known = notes, result, notes.known
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"otherwise": otherwise, "empty_strided": torch.empty_strided}
        self.parameters = ", ".join(f"a{i}" for i in range(len(notes.args)))
        self.pointed: dict[str, None] = {}
        """Arguments whose addresses the launches read."""
        self.views: list[Known] = []
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

    def _find(self, tensor: Tensor) -> Known:
        known = self.known.get(id(tensor))
        if known is None:
            raise NotPlannable("a tensor from elsewhere")
        return known

    def _view(self, known: Known) -> str:
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
        first = root.place + known.offset
        return f"p_{root.pool.name}" + (f" + {first}" if first else "")

    def function(self) -> Callable[..., Any]:
        if len(self.notes.steps) > MOST_STEPS:
            raise NotPlannable(f"{len(self.notes.steps)} steps")
        self._shape_results()
        used = self._used()
        self._pool(used)
        for kind, what in self.notes.steps:
            if kind != "allocate" or what in used:
                getattr(self, f"_{kind}")(what)
        launched = any(kind == "launch" for kind, _ in self.notes.steps)
        self.lines.append(f"return {self.value(self.result)}")
        body = [*self._guards(launched), *self._freed()]
        source = f"def plan({self.parameters}):\n" + "".join(f"    {line}\n" for line in body)
        exec(compile(source, "<plan>", "exec"), self.names)
        plan: Callable[..., Any] = self.names["plan"]
        plan.source = source  # type: ignore[attr-defined]
        return plan

    def _used(self) -> set[Known]:
        """The memory that some step or the result names."""
        steps = (what[1:3] if kind == "operate" else what[-1] for kind, what in self.notes.steps if kind != "allocate")
        return self._roots([self.result, *steps])

    def _roots(self, values: Any) -> set[Known]:
        return {self.known[id(tensor)].root for tensor in tensors_in(values) if id(tensor) in self.known}

    def _pool(self, used: set[Known]) -> None:
        """Places small memory that only launches read and write in one allocation, that of the first piece."""
        work_space = used - self._roots([self.result, *(what[1:3] for kind, what in self.notes.steps if kind == "operate")])
        allocated = [what for kind, what in self.notes.steps if kind == "allocate" and what in work_space]
        pieces = [piece for piece in allocated if 0 < piece.bytes <= LARGEST_PIECE]
        end = 0
        for piece in pieces:
            if end + piece.bytes <= LARGEST_POOL:
                piece.pool, piece.place = pieces[0], end
                end += -(-piece.bytes // PIECES_START_AT) * PIECES_START_AT
        if pieces:
            pieces[0].shape, pieces[0].strides = (-(-end // pieces[0].tensor.element_size()),), (1,)

    def _shape_results(self) -> None:
        """Memory that only launches use and that is returned as a single full view is allocated in the view's shape."""
        operands = {id(v) for kind, what in self.notes.steps if kind == "operate" for v in tensors_in(what[1:])}
        for value in tensors_in(self.result):
            known = self._find(value)
            root = known.root
            whole = known.tensor.is_contiguous() and root.tensor.is_contiguous() and value.numel() == root.tensor.numel()
            others = [k for k in self.known.values() if k.root is root and k is not known]
            met = any(id(k.tensor) in operands for k in (*others, known)) or any(
                k.tensor is v for k in others for v in tensors_in(self.result)
            )
            if root is not known and root.is_allocated and whole and not met:
                root.shape, root.strides = known.shape, known.strides

    def _guards(self, launched: bool) -> list[str]:
        """The condition under which a call differs from the recorded kind."""
        floats = [f"a{i} != {self.constant(arg)}" for i, arg in enumerate(self.notes.args) if isinstance(arg, float)]
        others = [*floats, *self.conditions(launched)]
        lines = [f"if {' or '.join(others)}: return otherwise({self.parameters})"] if others else []
        lines += [f"p_{name} = {name}.data_ptr()" for name in self.pointed]
        return lines + self.before_launches(launched)

    def conditions(self, launched: bool) -> list[str]:
        """Of what a plan with or without launches depends on, the source that is true where it has changed."""
        raise NotImplementedError

    def before_launches(self, launched: bool) -> list[str]:
        """What a plan does once the addresses are known."""
        return []

    def launch(self, *what: Any) -> list[str]:
        """The lines of a launch, of what `Notes.launched` was told."""
        raise NotImplementedError

    def _allocate(self, known: Known) -> None:
        if known.pool is not known:
            return
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

    def _points(self, known: Known) -> None:
        """Emits code that reads the address of memory used by a launch."""
        if any(
            self.known[id(arg)].root.pool is known
            for kind, what in self.notes.steps
            if kind == "launch"
            for arg in what[-1]
            if isinstance(arg, Tensor) and id(arg) in self.known
        ):
            self.lines.append(f"p_{known.name} = {known.name}.data_ptr()")

    def _operate(self, what: Any) -> None:
        function, args, kwargs, result, fresh = what
        if function.namespace != "aten" or not (result is None or tensors_in(result)):
            raise NotPlannable(f"{function}, or what it returns")
        values = [self.value(arg) for arg in args] + [f"{name}={self.value(arg)}" for name, arg in kwargs.items()]
        call = f"{self.constant(BINDINGS.get(function.overloadpacket.__name__, function))}({', '.join(values)})"
        if fresh and len(fresh) != len(tensors_in(result)):
            raise NotPlannable(f"{function} returns views beside other tensors")
        self.lines.append(f"{', '.join(known.name for known in fresh)} = {call}" if fresh else call)
        for known in fresh:
            self._points(known)

    def _launch(self, what: Any) -> None:
        self.lines += self.launch(*what)

    def argument(self, value: Any) -> str:
        """The source of a kernel's argument."""
        return self.address(value) if isinstance(value, Tensor) else self.constant(value)

    def _freed(self) -> list[str]:
        """The lines, with each tensor deleted after its last use, so that a loop keeps only one iteration's buffers."""
        last = {name: i for i, line in enumerate(self.lines) for name in re.findall(r"\b(?:p_)?(t\d+)\b", line)}
        ended: dict[int, list[str]] = {}
        for name, i in last.items():
            ended.setdefault(i, []).append(name)
        return [line for i, text in enumerate(self.lines) for line in (text, *self._end(i, ended))]

    def _end(self, i: int, ended: dict[int, list[str]]) -> list[str]:
        return [f"del {', '.join(ended[i])}"] if i in ended and i < len(self.lines) - 1 else []


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def _sizes(shape: Sequence[int]) -> str:
    """The arguments of `view`, which takes integers in half the time of a tuple."""
    return ", ".join(map(str, shape)) or "()"


def _share_memory(a: Tensor, b: Tensor) -> bool:
    first = a.untyped_storage().data_ptr()
    return first != 0 and first == b.untyped_storage().data_ptr()
