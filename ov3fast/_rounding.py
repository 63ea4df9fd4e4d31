"""How far rounding may move a float32 result on any chip: the a-priori error bound that ov3fast.testing allows.

A sum of n products, in whatever order, is off by at most about

    eps * sqrt(n) * sum_i |a_i| |b_i|

(Higham and Mary 2019: roundings that are independent and have mean 0 add up like sqrt(n), not like n), and an elementwise
operation by eps of its result. `a_priori_error` carries this through a formula that is more than one sum, gradients included: it runs
the formula in float64 while `WorstRounding` moves the result of each operation by its own bound, up or down at random, and looks at how
far the results go. The sum of absolute values is the same operation on absolute values, so no formula needs a second version.

Kernels that store bfloat16 accumulate in float32, so the eps is float32's for them too: what bfloat16 rounds on the way is in the error
that PyTorch makes in bfloat16, which hardly differs between chips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
DRAWS = 3
"""Patterns of signs that are tried; the largest error counts."""


def _variance_and_mean(
    x: Tensor, dim: list[int], unbiased: bool = True, keepdim: bool = False, correction: float | None = None
):
    mean = x.mean(dim, keepdim=True)
    count = x.numel() // max(mean.numel(), 1) - (unbiased if correction is None else correction)
    return (x - mean).square().sum(dim, keepdim=keepdim) / max(count, 0), mean if keepdim else mean.squeeze(dim)


SUMS: dict[Any, Callable[[Sequence[Any], Tensor], int]] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default), lambda args, out: args[0].shape[-1]),
    **dict.fromkeys(
        (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.linalg_vector_norm.default),
        lambda args, out: args[0].numel() // max(out.numel(), 1),
    ),
}
"""Sums, each with the number of its terms."""

COMPOSED = {
    **get_decompositions(
        [
            aten.addmm, aten.baddbmm, aten.mv, aten.dot, aten._softmax, aten._softmax_backward_data, aten._log_softmax,
            aten._log_softmax_backward_data, aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.native_layer_norm,
            aten.native_layer_norm_backward, aten.nll_loss_forward, aten.nll_loss_backward, aten.gelu, aten.gelu_backward, aten.silu,
            aten.silu_backward,
        ]
    ),
    aten.var_mean.correction: _variance_and_mean,
    aten.var_mean.dim: _variance_and_mean,
}  # fmt: skip
"""Operations that PyTorch fuses, taken apart, since the error of a part may be larger than the result (gelu(-4) cancels)."""

EXACT = {
    overload
    for operation in (aten.clone, aten.neg, aten.abs, aten.where, aten.masked_fill, aten.clamp, aten.clamp_min, aten.clamp_max)
    for overload in (getattr(operation, name) for name in operation.overloads())
}
"""Elementwise operations that round nothing."""


class WorstRounding(TorchDispatchMode):
    """Within the block, each sum and elementwise operation on floating tensors is off by its a-priori bound, the signs drawn from `seed`."""

    def __init__(self, eps: float, seed: int):
        super().__init__()
        self.eps, self.generator = eps, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation in COMPOSED:
            with self:
                return COMPOSED[operation](*args, **kwargs)
        result = operation(*args, **kwargs)
        if not (isinstance(result, Tensor) and result.is_floating_point()):
            return result
        if operation in SUMS:
            of_sizes = operation(*tree_map(_size, args), **kwargs)
            return result.add_(self.signs(result) * of_sizes * (self.eps * SUMS[operation](args, result) ** 0.5))
        if torch.Tag.pointwise in operation.tags and operation not in EXACT:
            result.mul_(1 + self.eps * self.signs(result))
        return result

    def signs(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype).bernoulli_(generator=self.generator).mul_(2).sub_(1).to(like.device)


def a_priori_error(formula: Callable[[], Sequence[Tensor]], eps: float) -> list[float]:
    """How far from its float64 results the tensors of `formula()` get when every operation is off by its bound, each the largest element's.

    formula: runs in float64, on the same inputs each time; its backward pass may be part of it.
    """
    exact = formula()
    largest = [0.0] * len(exact)
    for seed in range(DRAWS):
        with WorstRounding(eps, seed):
            moved = formula()
        for number, (m, e) in enumerate(zip(moved, exact, strict=True)):
            difference = (m - e).abs()[e.isfinite() & m.isfinite()]
            largest[number] = max(largest[number], float(difference.max()) if difference.numel() else 0.0)
    return largest


def _size(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value
