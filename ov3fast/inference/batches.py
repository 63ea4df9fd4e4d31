"""The same bits whatever batch an image rides in.

PyTorch picks a convolution's and a product's algorithm by the whole shape, so an image's last bits depend on its company. Our CPU kernels add in an order
that depends on a row's width alone, and oneDNN's convolutions in one that depends on the image alone:

    with batch_invariant(model):
        model.encode(batch)          # row i has the bits of model.encode(batch[i : i + 1])

`InProvenBatches` trusts none of that (another chip, a GPU, another PyTorch): a batch size is used once a batch of it had the bits of its items alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ov3fast import ops
from ov3fast.ops import _dispatch

WIDE = (torch.float32, torch.bfloat16)
"""Dtypes that the CPU kernels take."""


@contextlib.contextmanager
def batch_invariant(model: nn.Module) -> Iterator[None]:
    """Within the block, a model on the CPU runs on the operators' CPU kernels and oneDNN's convolutions, whatever the choice by speed.

    Nothing changes for a model on a GPU or of another dtype, where the CPU kernels aren't built, and where a backend is asked for already
    (`ops.use`, OV3FAST_IMPL): its bits are then those of that backend.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype not in WIDE:
        yield
        return
    with contextlib.ExitStack() as stack:
        if _dispatch.override() is None and ops.table()["linear"]["cpu"] == "ready":
            stack.enter_context(ops.use("cpu"))
        if torch.backends.mkldnn.is_available():
            stack.enter_context(_OneDnnConvolutions())
        yield


class _OneDnnConvolutions(TorchFunctionMode):
    """torch.conv2d by oneDNN, which PyTorch itself leaves aside for single small images."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and isinstance(args[3], tuple) and isinstance(args[4], tuple):
            x, weight, bias, stride, padding, dilation, groups = args
            if x.device.type == "cpu" and x.dtype in WIDE:
                return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
        return func(*args, **(kwargs or {}))


class InProvenBatches:
    """run(items) in batches of sizes 1, 2, 4, ... up to `most`, each used only if it gives every item the bits that it has alone.

    run: items -> a result each: tensors, strings, numbers, or tuples or dataclasses of these. The first batch of a size is run both ways, and the answers
    are those of the single items; so all answers are, whatever the size.
    """

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]], most: int) -> None:
        self.run, self.most = run, most
        self.proven: dict[int, bool] = {1: True}

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        results: list[Any] = []
        left = list(items)
        while left:
            size = self._size(len(left))
            part, left = left[:size], left[size:]
            results += self.run(part) if size in self.proven else self._try(part)
        return results

    def _size(self, count: int) -> int:
        """The largest power of two that fits and did not fail."""
        size = 1
        while 2 * size <= min(count, self.most) and self.proven.get(2 * size, True):
            size *= 2
        return size

    def _try(self, part: list[Any]) -> list[Any]:
        alone = [self.run([item])[0] for item in part]
        together = self.run(part)
        self.proven[len(part)] = all(same(a, b) for a, b in zip(alone, together, strict=True))
        return alone


def same(a: Any, b: Any) -> bool:
    """Whether two results have the same bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and same(tuple(vars(a).values()), tuple(vars(b).values()))
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
