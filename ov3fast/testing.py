"""What every operator is tried with: awkward inputs, and one error budget in place of hand-set tolerances.

    err(kernel) <= max(2 err(PyTorch), err a priori) + eps max|exact|

Errors are the largest absolute differences from the float64 result. PyTorch runs in the kernel's dtype, so the first term knows
what a dtype's storage costs. It also depends on the chip: where PyTorch is lucky with a sample, a kernel that sums in another order would
fail for no fault of its own. So the second term is what any order of summation is entitled to in the dtype of accumulation:
eps sqrt(n) sum|a||b| for a sum of n products, carried through the rest of the formula and its gradients (ov3fast._rounding). The last
term is the rounding of the result. A bug is not hidden: leaving out one term, dividing by n - 1, or accumulating in bfloat16 is over the
budget for each sum of each operator (tests/test_testing.py).

Importable by anyone who writes a backend:

    >>> import torch
    >>> from ov3fast import ops, testing
    >>> from ov3fast.ops.layer_norm import reference
    >>> x, weight, bias = testing.make(3, 40), testing.make(40, seed=1), testing.make(40, seed=2)
    >>> testing.check(ops.layer_norm, reference, (x, weight, bias), dtype=torch.bfloat16)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

RAGGED_SIZES = (1, 2, 3, 7, 17, 33, 65)
"""Sizes that are no multiple of any block."""


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal values that depend on the seed and the shape alone, never on the global generator."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + hash(shape) % 1_000_003)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def poisoned(value: Tensor) -> Tensor:
    """The same values as a view into a larger storage that is NaN everywhere around it (integers: a huge value)."""
    if value.ndim == 0:
        room = torch.full((3,), _poison(value.dtype), dtype=value.dtype, device=value.device)
        view = room[1]
    else:
        room = torch.full([size + 2 for size in value.shape], _poison(value.dtype), dtype=value.dtype, device=value.device)
        view = room[tuple(slice(1, size + 1) for size in value.shape)]
    view.copy_(value)
    return view


def transposed(value: Tensor) -> Tensor:
    """The same values with the first two axes stored in the other order."""
    return value.transpose(0, 1).contiguous().transpose(0, 1) if value.ndim >= 2 else value


def sliced(value: Tensor) -> Tensor:
    """The same values as every second row of a larger tensor."""
    return value.repeat_interleave(2, dim=0)[::2] if value.ndim >= 1 else value


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": transposed,
    "sliced": sliced,
    "poisoned": poisoned,
}


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from the float64 result; inf where one is NaN or infinite and the other is not the same."""
    actual, exact = actual.detach().double(), exact.detach().double()
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} where {tuple(exact.shape)} was due")
    if actual.numel() == 0:
        return 0.0
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (actual - exact).abs())
    return float(torch.where(difference.isnan(), torch.inf, difference).max())


def assert_within_budget(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "result", a_priori: Callable[[], float] | None = None
) -> None:
    """`actual` against the float64 result `exact`: the error budget on top of this file.

    same_dtype: what plain PyTorch gives in actual's dtype. a_priori: the bound of the sum, called only where twice PyTorch's error is not enough.
    """
    got, budget = error_and_budget(actual, same_dtype, exact, a_priori)
    if not got <= budget:
        raise AssertionError(f"{what}: error {got:.3e} is over the budget {budget:.3e} (largest value {_largest(exact):.3e})")


def error_and_budget(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, a_priori: Callable[[], float] | None = None
) -> tuple[float, float]:
    """The two that `assert_within_budget` compares."""
    rounded = torch.finfo(actual.dtype).eps * _largest(exact)
    got, budget = error(actual, exact), 2 * error(same_dtype, exact) + rounded
    if not got <= budget and a_priori:
        budget = max(budget, a_priori() + rounded)
    return got, budget


def _largest(exact: Tensor) -> float:
    finite = exact.detach()[exact.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


class Budget:
    """What the results of a formula may be off by.

    formula: plain PyTorch, from inputs to a list of results, its gradients among them if they are to be compared.
    inputs: in the dtypes that the formula's fast version is called with.
    """

    def __init__(self, formula: Callable[[Sequence[Any]], Sequence[Tensor]], inputs: Sequence[Any]):
        self._wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs]
        self._formula = formula
        self.plain, self.exact = formula(inputs), formula(self._wide)

    @functools.cached_property
    def a_priori(self) -> list[float]:
        """The bound of each result's sum, in float64 for results in float64 and in float32 otherwise."""
        from . import _rounding  # loads PyTorch's table of decompositions, which takes seconds

        accumulated = torch.float64 if all(p.dtype == torch.float64 for p in self.plain) else torch.float32
        return _rounding.a_priori_error(lambda: self._formula(self._wide), torch.finfo(accumulated).eps)

    def _bound_of(self, number: int) -> Callable[[], float]:
        return lambda: self.a_priori[number]

    def check(self, results: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
        """Raises AssertionError, naming the result, if one is over the budget."""
        names = names or [f"result {number}" for number in range(len(results))]
        for number, (r, p, e, name) in enumerate(zip(results, self.plain, self.exact, names, strict=True)):
            assert_within_budget(r, p, e, name, self._bound_of(number))

    def ratios(self, results: Sequence[Tensor]) -> list[float]:
        """The error of each result over its budget: above 1 `check` raises. 0 for no error at all."""
        found = []
        for number, (r, p, e) in enumerate(zip(results, self.plain, self.exact, strict=True)):
            got, budget = error_and_budget(r, p, e, self._bound_of(number))
            found.append(got / budget if got else 0.0)
        return found


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
    every_subset: bool = False,
    keep: Sequence[int] = (),
) -> None:
    """Forward and gradients of `function` against `reference`, within the error budget, and the same bits twice.

    inputs: positional arguments; floating tensors among them are given in float64 and cast to `dtype`, laid out by `layout`
    and differentiated (those whose position is in `keep` stay as they are). The upstream gradients are random, not uniform.
    every_subset: also tries each subset of inputs that require a gradient; the others must come back without one.
    """
    floats = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.is_floating_point() and i not in keep]
    narrow = [v.to(dtype) if i in floats else v for i, v in enumerate(inputs)]
    ours_inputs = [layout(v) if i in floats else v for i, v in enumerate(narrow)]
    ours = results(function, ours_inputs, floats)
    again = results(function, ours_inputs, floats)
    names = [f"output {i}" for i in range(len(ours) - len(floats))] + [f"gradient of input {i}" for i in floats]
    Budget(lambda values: results(reference, values, floats), narrow).check(ours, names)
    assert_same_bits(ours, again)
    if every_subset:
        gradients = dict(zip(floats, ours[-len(floats) :], strict=True))
        for subset in proper_subsets(floats):
            some = results(function, ours_inputs, subset)
            assert_same_bits(some[-len(subset) :], [gradients[i] for i in subset])


def proper_subsets(items: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every non-empty subset but the whole."""
    return itertools.chain.from_iterable(itertools.combinations(items, size) for size in range(1, len(items)))


def assert_same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        if not torch.equal(a.detach().nan_to_num(nan=12345.0), b.detach().nan_to_num(nan=12345.0)):
            raise AssertionError(f"tensor {number} differs between two runs on the same inputs")


def assert_same_bits_on_threads(run: Callable[[], Sequence[Tensor]], threads: Sequence[int] = (1, 2, 3)) -> None:
    """`run` gives the same bits on each number of threads; the number in force before is put back, whatever happens."""
    before, results = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            results.append(list(run()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def results(function: Callable[..., Any], inputs: Sequence[Any], floats: Sequence[int]) -> list[Tensor]:
    """Outputs, then the gradient of each input whose position is in `floats`, for upstream gradients that depend on shapes alone.

    An output that no such input reaches has no upstream gradient.
    """
    leaves = {i: inputs[i].detach().requires_grad_() for i in floats}
    returned = function(*[leaves.get(i, v) for i, v in enumerate(inputs)])
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    upstream = [make(*out.shape, seed=77 + n).to(out) for n, out in enumerate(outputs)]
    pairs = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
    grads = torch.autograd.grad([out for out, _ in pairs], list(leaves.values()), [grad for _, grad in pairs]) if leaves else []
    return [*(out.detach() for out in outputs), *grads]


def _poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
