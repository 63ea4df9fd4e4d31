"""One operator as PyTorch sees it: registration in torch.library, autograd, and the short way around the dispatcher.

`define` registers `ov3fast::op` and `ov3fast::op_backward`, each with a trailing `str impl`, so that torch.compile keeps one node, fake and
meta tensors have shapes, and dispatch modes (FlopCounterMode, selective checkpointing) see the operator. An eager call on plain tensors needs
none of these and goes straight to its backend, through an autograd.Function where gradients are wanted, which saves most of the
host time. What can be known from the kinds of its arguments (that they are valid, which backend takes them) is worked out once per kind.

Derivatives beyond the first backward are the specification's, by PyTorch: forward mode, vmap and nested torch.func transforms run it in place
of a backend, and the gradient of a gradient is taken through `differentiable_backward`. They are right for every operator, at PyTorch's speed
and memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _any_requires_grad as any_requires_grad
from torch._C import _are_functorch_transforms_active as are_functorch_transforms_active
from torch._C import _get_tracing_state as get_tracing_state
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C import _len_torch_dispatch_stack as len_torch_dispatch_stack
from torch._C._autograd import _top_saved_tensors_default_hooks as top_saved_tensors_default_hooks
from torch._C._dynamo.guards import TensorGuards
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from . import _check, _dispatch

LIBRARY = torch.library.Library("ov3fast", "DEF")

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
# What an argument of an eager call can be. Subclasses of Tensor (fake tensors, DTensor) need the dispatcher, and so do lists.
_PLAIN = _TENSORS | {type(None), int, float, bool, str}

KINDS = 8
"""How many kinds of calls with the same first size are told apart without working anything out."""


class Saved(NamedTuple):
    """What a forward saves for its backward."""

    tensors: tuple[Tensor | None, ...]
    options: tuple[Any, ...] = ()
    constants: tuple[Tensor, ...] = ()
    """Trailing outputs that have no gradient."""
    without_formula: tuple[Tensor, ...] = ()
    """Saved outputs without a derivative formula: a double backward that reaches them raises."""


class _Kind(NamedTuple):
    """Eager calls on plain tensors that agree in all that decides what runs them."""

    tensors: Callable[[tuple[Any, ...]], tuple[Tensor, ...]]
    """A call's arguments -> its tensors."""
    are_alike: Callable[..., bool]
    """Whether those have this kind's dtypes, devices, sizes, strides, `requires_grad`, and modes around them: one call of C++."""
    options: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None
    """A call's arguments -> what else counts."""
    known_options: tuple[Any, ...] | None
    function: Callable[..., Any]
    trailing: tuple[Any, ...]
    """What `function` takes after the arguments."""


class _KnownBackward(NamedTuple):
    """Backwards of plain calls of one kind that agree in the gradients asked for and in the kinds of those upstream."""

    tensors: Callable[[tuple[Any, ...]], tuple[Tensor, ...]] | None
    """The gradients upstream -> those that are not None; None if all are."""
    are_alike: Callable[..., bool]
    missing: tuple[None, ...]
    """What stands for the outputs that no gradient comes from."""
    function: Callable[..., Any]
    flags: list[bool]
    of_inputs: Callable[[tuple[Any, ...]], tuple[Any, ...]]


class Operator:
    """A registered operator. Call it with `impl` and the schema's arguments. See `define`."""

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        specification: Callable[..., Any] | None,
        check: Callable[..., None] | None,
        autocast: tuple[str, ...],
        **selection: Any,
    ):
        self.name = name
        self.specification = specification
        self.check = check or _anything
        self.inputs = [argument for _, argument in _dispatch.parse_schema(schema)]
        self.narrowed = [self.inputs.index(argument) for argument in autocast]
        tensors = [argument for kind, argument in _dispatch.parse_schema(schema) if kind in ("Tensor", "Tensor?")]
        self.select = _dispatch.Selector(name, schema, backward=False, inputs=tensors, check=self.check, **selection)
        self.registered = _register(name, schema, self.run, fake)
        self.apply: Callable[..., Any] | None = None
        self.transformed: type[torch.autograd.Function] | None = None

    def __call__(self, impl: str | None, *args: Any) -> Any:
        if not is_dynamo_compiling() and forward_ad._current_level < 0:
            for kind in self.select.kinds.get(_key(impl, args), ()):
                alike = kind.are_alike(*kind.tensors(args))
                if alike and (kind.options is None or kind.options(args) == kind.known_options):
                    return kind.function(*args, *kind.trailing)
        return self._call_new(impl, args)

    def _call_new(self, impl: str | None, args: tuple[Any, ...]) -> Any:
        request = _dispatch.request(self.name, impl)
        plain = _is_plain_call(args)
        if self.narrowed and (not plain or is_any_autocast_enabled()):
            args = self._narrow(args)
        if not plain:
            self.check(*args)
            return self._call_watched(impl, request, args)
        try:
            return self._call_plain(impl, request, args)
        except RuntimeError:
            # A tensor that outlived its torch.func transform is a wrapper without storage.
            unwrapped = unwrap_dead_wrappers(args)
            if all(new is old for new, old in zip(unwrapped, args, strict=True)):
                raise
        return self._call_plain(impl, request, unwrapped)

    def _call_plain(self, impl: str | None, request: str, args: tuple[Any, ...]) -> Any:
        selected = self.select(request, args)
        function: Callable[..., Any] = selected.inference
        trailing: tuple[Any, ...] = ()
        # Where there is a contract, PyTorch's own nodes do.
        if self.apply is not None and selected.contract is None and is_grad_enabled() and any_requires_grad(*args):
            function, trailing = self.apply, (request, selected)
        elif is_any_autocast_enabled():
            return _without_autocast(function, args)
        if self.select.remembers and not is_any_autocast_enabled():  # the guards don't know autocast's dtype
            self._remember(impl, args, function, trailing)
        return function(*args, *trailing)

    def _remember(
        self, impl: str | None, args: tuple[Any, ...], function: Callable[..., Any], trailing: tuple[Any, ...]
    ) -> None:
        if len(self.select.kinds) >= 4096:
            self.select.kinds.clear()
        kinds = self.select.kinds.setdefault(_key(impl, args), [])
        if len(kinds) >= KINDS:
            return
        tensors = _getter([i for i, arg in enumerate(args) if isinstance(arg, Tensor)])
        are_alike = _guard(tensors(args))
        if are_alike is None:
            return
        others = [i for i, arg in enumerate(args) if isinstance(arg, (int, str))]
        options = _getter(others) if others else None
        if self.select.alignment_matters:
            options = functools.partial(_with_alignment, _getter(others), tensors)
        kinds.append(_Kind(tensors, are_alike, options, options and options(args), function, trailing))

    def _call_watched(self, impl: str | None, request: str, args: tuple[Any, ...]) -> Any:
        if not torch.compiler.is_compiling():
            if self.specification is not None and _is_transformed(args):
                if impl is not None and request != "eager":
                    raise NotImplementedError(
                        f"{self.name}: impl={impl!r} has no forward-mode, batched or nested derivative;"
                        " leave impl out and PyTorch runs the specification"
                    )
                return self.specification(*args)
            if self.transformed is not None and torch._C._are_functorch_transforms_active():
                return self.transformed.apply(*args, request)
        return self.registered(*args, request)

    def _narrow(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as torch.autocast casts them."""
        narrowed = dict(zip(self.narrowed, _check.autocast(*(args[i] for i in self.narrowed)), strict=True))
        return tuple(narrowed.get(i, arg) for i, arg in enumerate(args))

    def run(self, *args: Any) -> Any:
        """The forward, on the backend that the last argument asks for."""
        *inputs, word = args
        selected = self.select(_dispatch.decode(word), inputs)
        return _without_autocast(selected.contract or selected.function, inputs)

    def define_backward(
        self,
        schema: str,
        fake: Callable[..., Any],
        save: Callable[..., Saved],
        gradients: dict[str, int],
        differentiable: Callable[..., Any],
        upstream: int,
        shortcut: Callable[..., Any] | None,
        **selection: Any,
    ) -> None:
        """Register `<name>_backward`, and autograd for it and for the forward."""
        arguments = [argument for _, argument in _dispatch.parse_schema(schema)]
        self.save, self.upstream, self.shortcut, self.differentiable_backward = save, upstream, shortcut, differentiable
        self.gradient_of_input = [gradients.get(argument) for argument in self.inputs]
        self.inputs_of_gradient = [
            [i for i, output in enumerate(self.gradient_of_input) if output == number]
            for number in range(sum(argument.startswith("need_") for argument in arguments))
        ]
        tensors = [*arguments[:upstream], *self.inputs]
        self.select_backward = _dispatch.Selector(self.name, schema, backward=True, inputs=tensors, **selection)
        self.registered_backward = _register(f"{self.name}_backward", schema, self.run_backward, fake)
        torch.library.register_autograd(
            f"ov3fast::{self.name}",
            self._backward,
            setup_context=functools.partial(self._setup_context, registered=True),
            lib=LIBRARY,
        )
        torch.library.register_autograd(
            f"ov3fast::{self.name}_backward", self._backward_twice, setup_context=_save_all, lib=LIBRARY
        )
        node = _make_node(self.name, forward=self._forward_in_node, backward=self._backward_in_node)
        # Not node.apply, which looks for transforms of torch.func first: plain calls have none.
        self.apply = super(torch.autograd.Function, node).apply  # type: ignore[misc]  # written in C++
        self.wanted: dict[tuple[bool, ...], tuple[list[bool], itemgetter[Any]]] = {}
        # Nodes that torch.func.grad and vjp can go through; slower to make.
        self.transformed = _make_node(
            f"{self.name}_transformed", forward=self._execute, setup_context=self._setup_context, backward=self._backward
        )
        self.transformed_backward = _make_node(
            f"{self.name}_backward_transformed",
            forward=self._execute_backward,
            setup_context=_save_all,
            backward=self._backward_twice,
        )

    def run_backward(self, *args: Any) -> Any:
        """The backward, on the backend that the last argument asks for."""
        *inputs, word = args
        return _without_autocast(self.select_backward(_dispatch.decode(word), inputs).function, inputs)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any, registered: bool = False) -> None:
        *args, word = inputs
        saved = self._keep(ctx, args, output, word)
        ctx.mark_non_differentiable(*saved.constants, *(saved.without_formula if registered else ()))

    def _forward_in_node(self, ctx: Any, *args: Any) -> Any:
        """The forward of a plain call that leads to gradients: of (*arguments, word, what was selected), the outputs that have some."""
        inputs, selected = args[:-2], args[-1]
        output = selected.function(*inputs) if not is_any_autocast_enabled() else _without_autocast(selected.function, inputs)
        # A hook may give back other tensors than were saved, of another kind.
        constants = self._keep(
            ctx, inputs, output, args[-2], None if top_saved_tensors_default_hooks(False) else selected
        ).constants
        return output[: -len(constants)] if constants else output

    def _backward_in_node(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """`_backward` of a plain call. Its kind follows from the forward's, which gradients are asked for, and the kind of those upstream: that of a
        saved tensor changes only where somebody puts one of another layout in its `.data`, which autograd doesn't allow either."""
        options, _, selected = ctx.kept
        if selected is None or is_grad_enabled() or forward_ad._current_level >= 0:
            return self._backward(ctx, *grads)
        needs = ctx.needs_input_grad
        for known in selected.backwards.get((needs, *map(type, grads)), ()):
            if known.are_alike(*(grads if known.tensors is None else known.tensors(grads))):
                args = *grads[: self.upstream], *known.missing, *ctx.saved_tensors, *options, *known.flags
                made = None if self.shortcut is None else self.shortcut(*args)
                made = known.function(*args) if made is None else made
                found: tuple[Tensor | None, ...] = known.of_inputs((None, made) if isinstance(made, Tensor) else (None, *made))
                return found
        if grads[0] is not None and all(grad is None for grad in grads[self.upstream :]) and _is_plain_backward(grads):
            self._remember_backward(selected, ctx, grads)
        return self._backward(ctx, *grads)

    def _remember_backward(self, selected: _dispatch.Selected, ctx: Any, grads: tuple[Tensor | None, ...]) -> None:
        needs = ctx.needs_input_grad
        kinds = selected.backwards.setdefault((needs, *map(type, grads)), [])
        places = [i for i, grad in enumerate(grads) if grad is not None]
        are_alike = _guard([grads[i] for i in places])
        if len(kinds) >= KINDS or are_alike is None:
            return
        flags, of_inputs = self._wanted(needs)
        missing = (None,) * (self.upstream - len(grads))
        options, word, _ = ctx.kept
        args = *grads[: self.upstream], *missing, *ctx.saved_tensors, *options, *flags
        tensors = None if len(places) == len(grads) else _getter(places)
        function = self.select_backward(word, args).function
        kinds.append(_KnownBackward(tensors, are_alike, missing, function, flags, of_inputs))

    def _keep(
        self, ctx: Any, inputs: Sequence[Any], output: Any, word: str, selected: _dispatch.Selected | None = None
    ) -> Saved:
        saved = self.save(inputs, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved.tensors)
        ctx.kept = saved.options, word, selected
        return saved

    def _backward(self, ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = (*grad_outputs, *(None,) * self.upstream)[: self.upstream]
        for grad in grad_outputs[self.upstream :]:
            if grad is not None:
                raise NotImplementedError(
                    f"{self.name} saves gradients instead of its inputs, so they can't be differentiated again;"
                    " linear_cross_entropy can with reduction='none'"
                )
        if upstream[0] is None:
            some = next((grad for grad in upstream if grad is not None), None)
            if some is None:
                return (None,) * len(ctx.needs_input_grad)
            upstream = torch.zeros_like(some), *upstream[1:]
        flags, of_inputs = self._wanted(ctx.needs_input_grad)
        options, word, _ = ctx.kept
        grads = self._call_backward((*upstream, *ctx.saved_tensors, *options, *flags), word)
        grads = (grads,) if isinstance(grads, Tensor) else grads
        found: tuple[Tensor | None, ...] = of_inputs((None, *grads))
        return found

    def _wanted(self, needs: tuple[bool, ...]) -> tuple[list[bool], itemgetter[Any]]:
        """The backward's flags, and the getter that picks the inputs' gradients from (None, *its outputs)."""
        found = self.wanted.get(needs)
        if found is None:
            flags = [any(needs[i] for i in inputs) for inputs in self.inputs_of_gradient]
            outputs = self.gradient_of_input + [None] * (len(needs) - len(self.gradient_of_input))
            places = [1 + output if output is not None and need else 0 for output, need in zip(outputs, needs, strict=True)]
            found = self.wanted[needs] = flags, itemgetter(*places)
        return found

    def _execute(self, *args: Any) -> Any:
        """The forward below all transforms."""
        return (self.run if _is_plain_call(args) else self.registered)(*args)

    def _execute_backward(self, *args: Any) -> Any:
        return (self.run_backward if _is_plain_call(args) else self.registered_backward)(*args)

    def _call_backward(self, args: tuple[Any, ...], word: str) -> Any:
        with_graph = is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not with_graph and _is_plain_call(args):
            known = None if self.shortcut is None else self.shortcut(*args)
            return _without_autocast(self.select_backward(word, args).function, args) if known is None else known
        if not torch.compiler.is_compiling():
            if _is_transformed(args):
                return self.differentiable_backward(*args)
            if torch._C._are_functorch_transforms_active():
                return self.transformed_backward.apply(*args, word)
        return self.registered_backward(*args, word)

    def _backward_twice(self, ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of a gradient: of `differentiable_backward`, which PyTorch differentiates as often as is asked for."""
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if is_tensor else value for is_tensor, value in ctx.arguments]
        with torch.enable_grad():
            # Views, since one tensor may be passed as two arguments whose gradients must stay apart.
            args = [a.view_as(a) if need else a for a, need in zip(args, ctx.needs_input_grad[:-1], strict=True)]
            outputs = self.differentiable_backward(*args)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        grads: list[Tensor | None] = [None] * (len(args) + 1)
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs], [args[i] for i in wanted], [g for _, g in pairs],
                create_graph=is_grad_enabled(), allow_unused=True,
            )  # fmt: skip
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad
        return tuple(grads)


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    specification: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    autocast: tuple[str, ...] = (),
    backward_schema: str | None = None,
    backward_fake: Callable[..., Any] | None = None,
    save: Callable[..., Saved] | None = None,
    gradients: dict[str, int] | None = None,
    differentiable_backward: Callable[..., Any] | None = None,
    upstream: int = 1,
    backward_shortcut: Callable[..., Any] | None = None,
    **selection: Any,
) -> Operator:
    """Registers `ov3fast::name` (and `ov3fast::name_backward`), each with a trailing `str impl`, over the backends of `name`.

    schema: the part behind the name, e.g. "(Tensor x, float eps) -> (Tensor y, Tensor rstd)". fake: the arguments without `impl` -> outputs
    with their shapes. specification: the arguments -> the outputs that have gradients, in plain PyTorch. save: (inputs, output) -> Saved.
    gradients: name of an input -> number of the backward's output that is its gradient. autocast: the arguments that torch.autocast casts.

    check: raises TypeError or ValueError for arguments that the operator does not take. It may look at what Backend.unsupported_reason may, since
    an eager call that looks like one before it is not checked again.

    backward_schema: the first `upstream` arguments are the gradients of as many outputs; then come Saved.tensors, Saved.options, and
    `bool need_...` for as many of the first outputs as it names. differentiable_backward: the same, in PyTorch that autograd can go through.
    backward_shortcut: the same arguments -> the gradients where an eager call can have them for nothing, arguments themselves included, or None.
    """
    operator = Operator(name, schema, fake, specification, check, autocast, **selection)
    if backward_schema is not None:
        assert backward_fake and save and gradients and differentiable_backward
        operator.define_backward(
            backward_schema,
            backward_fake,
            save,
            gradients,
            differentiable_backward,
            upstream,
            backward_shortcut,
            **selection,
        )
    return operator


def gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `function(*inputs)` with respect to all inputs, visible to any transform or graph around them."""
    found: tuple[Tensor, ...] = torch.func.vjp(function, *inputs)[1](grad_output)
    return found


def _is_transformed(args: tuple[Any, ...]) -> bool:
    """Whether the registered backward can't serve this call: forward mode, vmap, nested torch.func transforms."""
    if torch._C._are_functorch_transforms_active():
        levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
        return levels != [torch._C._functorch.TransformType.Grad]
    return forward_ad._current_level >= 0 and any(
        isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
    )


def _key(impl: str | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where the kinds of calls like this one are kept."""
    shape = args[0].shape if type(args[0]) in _TENSORS else None  # a fake tensor's may have symbols, which have no hash
    return impl, _dispatch._override, is_grad_enabled(), shape, *map(type, args)


def _guard(tensors: Sequence[Any]) -> Callable[..., bool] | None:
    """What tells whether others are of these tensors' kind; None where one is there twice, which the guards take for another kind."""
    if len(set(map(id, tensors))) < len(tensors):
        return None
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _with_alignment(
    options: Callable[..., tuple[Any, ...]], tensors: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...]
) -> tuple[Any, ...]:
    return *options(args), *(tensor.data_ptr() % 16 for tensor in tensors(args))


def _is_plain_call(args: tuple[Any, ...]) -> bool:
    """Whether only the backend has to see this call: no compiler, transform, dual tensor, dispatch mode or subclass."""
    return not (
        is_compiling()
        or len_torch_dispatch_stack()
        or are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, args))
        or getattr(args[0], "is_meta", True)  # not a tensor: the check will raise
    )


def _is_plain_backward(grads: tuple[Any, ...]) -> bool:
    """`_is_plain_call` of a node's backward, whose saved tensors are plain since its forward's arguments were. A graph of it is none."""
    return not (
        is_grad_enabled()
        or is_compiling()
        or len_torch_dispatch_stack()
        or are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or get_tracing_state() is not None
        or is_any_autocast_enabled()
        or not _PLAIN.issuperset(map(type, grads))
    )


def _anything(*_: Any) -> None:
    """The check of an operator whose public function checks its arguments itself."""


def _without_autocast(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Runs with autocast off: the public functions have cast already, and a backend's float32 intermediates must stay float32."""
    if not torch._C._is_any_autocast_enabled():
        return function(*args)
    flat = (value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    device = next((value.device.type for value in flat if isinstance(value, Tensor)), "cpu")
    with torch.autocast(device, enabled=False):
        return function(*args)


def _register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    arguments, returns = schema.split("->")
    arguments = arguments.strip().removesuffix(")") + ", str impl)"
    LIBRARY.define(f"{name}{arguments} ->{returns}")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ov3fast::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
    return getattr(torch.ops.ov3fast, name)


def _make_node(name: str, **functions: Callable[..., Any]) -> type[torch.autograd.Function]:
    return type(f"ov3fast_{name}", (torch.autograd.Function,), {key: staticmethod(f) for key, f in functions.items()})


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *args, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
    ctx.arguments = [(isinstance(arg, Tensor), None if isinstance(arg, Tensor) else arg) for arg in args]
