"""What every operator is tried with: awkward inputs, and one error budget in place of hand-set tolerances.

    err(kernel, fp64) <= 2 * err(PyTorch in the same dtype, fp64) + eps * max|fp64|

Importable by anyone who writes a backend:

    from ov3fast import testing
    testing.check(ops.layer_norm, ops.layer_norm_reference, (x, weight, bias), dtype=torch.bfloat16)
"""

from __future__ import annotations

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


def assert_within_budget(actual: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "result") -> None:
    """`actual` against the float64 result `exact`, allowed twice the error of plain PyTorch's `same_dtype` plus one eps."""
    finite = exact.detach()[exact.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    budget = 2 * error(same_dtype, exact) + torch.finfo(actual.dtype).eps * largest
    if actual.dtype == torch.float64:  # nothing wider to measure PyTorch's own error against
        budget += 1e-12 * largest
    got = error(actual, exact)
    if not got <= budget:
        raise AssertionError(f"{what}: error {got:.3e} is over the budget {budget:.3e} (largest value {largest:.3e})")


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
    wide = [v.double() if i in floats else v for i, v in enumerate(narrow)]
    exact, exact_grads = _run(reference, wide, floats)
    plain, plain_grads = _run(reference, narrow, floats)
    ours_inputs = [layout(v) if i in floats else v for i, v in enumerate(narrow)]
    ours, ours_grads = _run(function, ours_inputs, floats)
    again, again_grads = _run(function, ours_inputs, floats)
    for number, (a, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_within_budget(a, p, e, f"output {number}")
    for position in floats:
        assert_within_budget(
            ours_grads[position], plain_grads[position], exact_grads[position], f"gradient of input {position}"
        )
    assert_same_bits([*ours, *ours_grads.values()], [*again, *again_grads.values()])
    if every_subset:
        for subset in proper_subsets(floats):
            _, some = _run(function, ours_inputs, subset)
            assert_same_bits([some[i] for i in subset], [ours_grads[i] for i in subset])


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


def _run(function: Callable[..., Any], inputs: Sequence[Any], floats: Sequence[int]) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Outputs, and the gradient of every input in `floats`, for upstream gradients that depend on shapes alone."""
    leaves = {i: inputs[i].detach().requires_grad_() for i in floats}
    result = function(*[leaves.get(i, v) for i, v in enumerate(inputs)])
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    upstream = [make(*out.shape, seed=77 + n).to(out) for n, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return [out.detach() for out in outputs], dict(zip(leaves, grads, strict=True))


def _poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
