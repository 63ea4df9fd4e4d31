"""A model whose encode, encode_latents and reconstruct replay CUDA graphs: at small batches, launching a tower's kernels from Python takes longer
than running them on the GPU.

    fast = capture(model.eval(), sizes=[(1, 256), (32, 256)])
    pooled, tokens = fast.encode(images)        # recorded at the first call of a size, replayed afterwards
    fast.original is model                      # unchanged
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ov3fast import _graphs
from ov3fast.data.preprocess import as_images
from ov3fast.models.config import VAE_STRIDE

METHODS = ("encode", "encode_latents", "reconstruct")
MOST = 8
"""Graphs kept if no sizes are given, over all methods; the least recently used is dropped first."""

Model = TypeVar("Model", bound=nn.Module)


def capture(model: Model, sizes: Iterable[tuple[int, int]] | None = None, *, most: int = MOST) -> Model:
    """Returns `model` with its METHODS run as CUDA graphs. Everything else, including the weights, is shared with `model`, which is the result's
    `.original`.

    model: an OpenVision3, a VisionTower or a ViTEncoder in eval mode on a GPU. sizes: (batch, side of the images in pixels) for which graphs are
    recorded, each at its first call; None records any size and keeps `most` graphs. Calls of other sizes, or with inputs that require grad,
    run the original's method: `eager_calls` counts them by reason, with one warning per reason. Results have no gradient, and later calls don't
    overwrite them. Calls from several threads or streams are serialized.

    The weights may change in place (an optimizer's step, load_state_dict). After `.to(...)` or `set_vae`, graphs are recorded again.
    ValueError for a model on a CPU or in training mode, or a wrong size.
    """
    model = getattr(model, "original", model)
    _graphs.check_device("capture", _device(model))
    if model.training:
        raise ValueError("capture: the model is in training mode; call eval() first")
    if sizes is not None:
        sizes = frozenset(sizes)
        stride = VAE_STRIDE * _encoder(model).config.patch_size
        for batch, side in sizes:
            if batch < 1 or side < 1 or side % stride:
                raise ValueError(
                    f"capture: sizes are (batch, side), the side a multiple of {stride} pixels; got ({batch}, {side})"
                )
    if most < 1:
        raise ValueError(f"capture: most must be at least 1, got {most}")
    methods = {name: _method(name) for name in METHODS if hasattr(model, name)}
    captured = copy.copy(model)
    captured.__class__ = type(f"Captured{type(model).__name__}", (type(model),), {**methods, "_apply": _apply})
    # Bypasses nn.Module's bookkeeping: the original must not become a submodule.
    captured.__dict__.update(original=model, eager_calls=Counter(), _graphs=_Graphs(model, sizes, most))
    return captured


class _Graphs:
    """The graphs of one model, by method and what they were recorded for."""

    def __init__(self, model: nn.Module, sizes: frozenset[tuple[int, int]] | None, most: int) -> None:
        self.model, self.sizes, self.most = model, sizes, most
        self.lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        self.known: OrderedDict[Any, _graphs.Graph] = OrderedDict()
        self.pool: Any = None
        self.last: torch.cuda.Event | None = None

    def refusal(self, name: str, inputs: list[Tensor]) -> str | None:
        """Why these inputs go to the original, or None."""
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            return "an input requires grad"
        batch, channels, height, width = inputs[0].shape if inputs[0].ndim == 4 else (0, 0, 0, 0)
        scale = VAE_STRIDE if name == "encode_latents" else 1
        if self.sizes is not None and (height != width or (batch, height * scale) not in self.sizes):
            return f"{list(inputs[0].shape)} is not one of the captured sizes"
        return None

    def run(self, name: tuple[Any, ...], function: Callable[..., Any], inputs: list[Tensor]) -> Any:
        """`function(*inputs)` by a graph, recorded if necessary; `name` is everything else that the function depends on."""
        device = _device(self.model)
        weight, vae = next(self.model.parameters()), getattr(_encoder(self.model), "vae", None)
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = name, _graphs.signature(inputs), weight.data_ptr(), weight.dtype, id(vae), autocast
        # Inference tensors as buffers could not be written outside inference mode.
        with self.lock, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            if self.last is not None:
                torch.cuda.current_stream().wait_event(self.last)
            graph = self.known.get(key)
            if graph is None:
                if any(known[2:5] != key[2:5] for known in self.known):
                    self.forget()
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                graph = self.known[key] = _graphs.Graph(function, [value.to(device) for value in inputs], self.pool)
                if self.sizes is None and len(self.known) > self.most:
                    self.known.popitem(last=False)
            self.known.move_to_end(key)
            results = tree_map(torch.clone, graph(*inputs))
            self.last = torch.cuda.Event()
            self.last.record()
        return results


def _method(name: str) -> Callable[..., Any]:
    def method(self: Any, images: Any, **options: Any) -> Any:
        original = self._graphs.model
        if name != "encode_latents":
            images = as_images(images, _encoder(original).config.image_size)
        tensors = {option: value for option, value in options.items() if isinstance(value, Tensor)}
        others = {option: value for option, value in options.items() if option not in tensors}

        def function(x: Tensor, *values: Tensor) -> Any:
            return getattr(original, name)(x, **dict(zip(tensors, values, strict=True)), **others)

        inputs = [images, *tensors.values()]
        reason = self._graphs.refusal(name, inputs)
        if reason is None:
            return self._graphs.run((name, *tensors, *sorted(others.items())), function, inputs)
        self.eager_calls[reason] += 1
        if self.eager_calls[reason] == 1:
            warnings.warn(f"{name}: run without a graph, since {reason}", stacklevel=2)
        return function(*inputs)

    method.__name__ = name
    return method


def _apply(self: Any, *args: Any, **options: Any) -> Any:
    """`.to(...)` and the like: they move the shared tensors, so the graphs become invalid."""
    self._graphs.forget()
    super(type(self), self)._apply(*args, **options)
    return self


def _encoder(model: nn.Module) -> Any:
    return getattr(model, "encoder", model)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
