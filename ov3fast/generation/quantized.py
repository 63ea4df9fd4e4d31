"""int8 sampling on CPUs: oneDNN computes the matrix products of a generator's blocks, the rest runs in bfloat16.

Ranges are calibrated in a short sampling run over all times with fixed noise, classes and steps, so a sample still depends only
on its own seed and condition. Embeddings, the final layer and the trunk's modulation (one row per image) are not quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ov3fast.inference.int8 import QuantizedLinear, Range, unavailable_reason


class Int8Linear(nn.Module):
    """x [..., K] of any dtype -> bfloat16 [..., O]."""

    def __init__(self, linear: nn.Linear, seen: Range) -> None:
        super().__init__()
        self.product = QuantizedLinear(linear.weight, linear.bias, seen.scale_and_zero(), torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def products(generator: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers to quantize, by name."""
    return {
        name: module
        for name, module in generator.named_modules()
        if isinstance(module, nn.Linear)
        and (name.startswith("head.") or (name.startswith("trunk.") and not name.endswith("modulation")))
    }


def quantized(generator: nn.Module, run: Callable[[], object]) -> nn.Module:
    """A copy with int8 products, ranges observed while `run` calls the generator. RuntimeError if int8 is unavailable."""
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"generate: precision 'int8' is not to be had: {reason}")
    seen = {name: Range() for name in products(generator)}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].see(inputs[0]))
        for name, module in products(generator).items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    made = copy.deepcopy(generator)
    for name, linear in products(made).items():
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, Int8Linear(linear, seen[name]))
    return made
