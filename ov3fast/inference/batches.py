"""Batch invariance: an image's result has the same bits in any batch.

PyTorch picks algorithms for convolutions and matrix products by the whole shape, so an image's last bits depend on the batch around it. Our CPU
kernels sum in an order that depends only on a row's width, and oneDNN's convolutions in one that depends only on the image:

    with batch_invariant(model):
        model.encode(batch)          # row i has the bits of model.encode(batch[i : i + 1])

`InProvenBatches` relies on none of that (another chip, a GPU, another PyTorch): a batch size is used only after a batch of that size reproduced the
bits of its items run alone.
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
    """Within the block, a model on the CPU uses the operators' CPU kernels and oneDNN's convolutions, even where others are faster.

    Nothing changes for a model on a GPU or of another dtype, if the CPU kernels aren't built, or if a backend was already requested
    (`ops.use`, OV3FAST_IMPL): the bits are then that backend's.
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
    """torch.conv2d by oneDNN, which PyTorch itself doesn't use for single small images."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and isinstance(args[3], tuple) and isinstance(args[4], tuple):
            x, weight, bias, stride, padding, dilation, groups = args
            if x.device.type == "cpu" and x.dtype in WIDE:
                return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
        return func(*args, **(kwargs or {}))


class InProvenBatches:
    """run(items) in batches of sizes 1, 2, 4, ... up to `most`, each used only if every item gets the bits that it has alone.

    run: items -> one result each: tensors, strings, numbers, or tuples or dataclasses of these. The first batch of a size is also run item by item, and
    those results are returned; so results never depend on the batch size.
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
