"""Floating-point operations of the operators, for torch.utils.flop_counter.FlopCounterMode: 2 for each multiply-add of the matrix products.

As PyTorch counts its own: elementwise work, normalisation and softmax are not counted, nor is what a causal mask saves. A backward counts
the products of the gradients that are asked for, and those that are computed again.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

Shape = tuple[int, ...]


FORMULAS: dict[str, Callable[..., int]] = {}
"""Operator of torch.ops.ov3fast, by name -> its formula; operators without matrix products have none."""

COUNTER = "torch.utils.flop_counter"


def counts(op: str, forward: Callable[..., int], backward: Callable[..., int] | None = None) -> None:
    """Registers the FLOP formulas of `op`: functions of its registered arguments (without `impl`), with shapes in place of tensors."""
    for name, formula in ((op, forward), (f"{op}_backward", backward)):
        if formula is not None:
            FORMULAS[name] = formula
            if COUNTER in sys.modules:
                _register(sys.modules[COUNTER], name)


def product(x: Shape, weight: Shape) -> int:
    """Of x [..., K] and weight [N, K]."""
    return 2 * math.prod(x) * weight[0]


def _register(counter: ModuleType, name: str) -> None:
    formula = FORMULAS[name]
    counter.register_flop_formula(getattr(torch.ops.ov3fast, name))(lambda *args, out_shape=None, **_: formula(*args))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is first imported. Importing it here would import Triton, which few callers need."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                for name in FORMULAS:
                    _register(module, name)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
