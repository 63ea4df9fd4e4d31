"""The error budget accepts any order of summation and rejects mutations of every sum of an operator."""

import pytest
import torch
from kernel_tools.mutants import MUTATIONS, Mutant, number_of_sums
from kernel_tools.samples import SAMPLES

from ov3fast import testing
from ov3fast._rounding import a_priori_error

MUTATED = ["linear", "layer_norm", "flash_attention", "contrastive_loss-softmax", "contrastive_loss-sigmoid", "linear_cross_entropy", "mlp-gelu"]  # fmt: skip


def sample(name):
    return next(sample for sample in SAMPLES if sample.name == name)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", MUTATED)
def test_no_mutation_of_a_sum_is_within_the_budget(name, mutation):
    """The eager operator and its gradients, in float32, with each of its sums mutated in turn."""
    chosen = sample(name)
    inputs = chosen.inputs("tiny", torch.float32)

    def run(values):
        return chosen.results(values, chosen.plain)

    budget = testing.Budget(run, inputs)
    sums = number_of_sums(lambda: run(inputs))
    assert sums >= 4

    def survives(turn):
        with Mutant(mutation, turn):
            mutated = run(inputs)
        try:
            budget.check(mutated)
        except AssertionError:
            return False
        return True

    assert not [turn for turn in range(sums) if survives(turn)]


def test_bfloat16_accumulation_of_bfloat16_products_is_over_the_budget():
    """Even though storage rounds as coarsely as the mutated sum."""
    inputs = [testing.make(33, 1024).bfloat16(), testing.make(17, 1024, seed=1).bfloat16()]
    budget = testing.Budget(lambda values: [values[0] @ values[1].T], inputs)
    with Mutant("bfloat16_accumulation", turn=0):
        mutated = inputs[0] @ inputs[1].T
    with pytest.raises(AssertionError, match="result 0"):
        budget.check([mutated])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_order_of_summation_is_within_the_budget(dtype):
    """Sequential, pairwise and reversed sums; with PyTorch's own error set to zero."""
    a, b = testing.make(40, 300), testing.make(30, 300, seed=1)

    def orders(a, b):
        terms = a[:, None] * b
        running = torch.zeros(40, 30, dtype=dtype)
        for k in range(300):
            running = running + terms[..., k]
        yield running
        yield terms.flip(-1).cumsum(-1)[..., -1]
        while terms.shape[-1] > 1:
            terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2)).unflatten(-1, (-1, 2)).sum(-1)
        yield terms[..., 0]

    narrow = a.to(dtype), b.to(dtype)
    wide = [v.double() for v in narrow]
    exact = wide[0] @ wide[1].T
    [bound] = a_priori_error(lambda: [wide[0] @ wide[1].T], torch.finfo(dtype).eps)
    for total in orders(*narrow):
        testing.assert_within_budget(total, exact, exact, a_priori=lambda: bound)


def test_the_bound_is_the_formula_on_absolute_values():
    a, b = testing.make(7, 50), testing.make(50, 9, seed=1)
    eps = 2.0**-20
    [bound] = a_priori_error(lambda: [a @ b], eps)
    assert bound == pytest.approx(float((a.abs() @ b.abs()).max()) * eps * 50**0.5, rel=1e-6)


def test_the_bound_knows_cancellation():
    """A variance of values far from 0 is as inaccurate as their mean; a sum of two numbers is accurate to eps."""
    x = testing.make(4, 64)
    norm = [a_priori_error(lambda x=x: [torch.nn.functional.layer_norm(x, (64,))], 2.0**-23)[0] for x in (x, x + 1000)]
    assert norm[1] > 100 * norm[0]
    [bound] = a_priori_error(lambda: [x + x], 2.0**-23)
    assert bound == pytest.approx(2.0**-23 * float((x + x).abs().max()))


def test_a_result_of_the_wrong_shape_or_with_a_stray_nan_is_over_the_budget():
    x = testing.make(3, 4, dtype=torch.float32)
    budget = testing.Budget(lambda values: [values[0] + 1], [x])
    budget.check([x + 1])
    with pytest.raises(AssertionError, match=r"shape \(4, 3\)"):
        budget.check([(x + 1).T])
    wrong = x + 1
    wrong[0, 0] = torch.nan
    with pytest.raises(AssertionError, match="result 0: error inf"):
        budget.check([wrong])


def test_ratio_to_the_budget():
    """Above 1, `check` raises."""
    x = testing.make(5, dtype=torch.float32)
    budget = testing.Budget(lambda values: [values[0] + 1, values[0]], [x])
    [ratio, exact] = budget.ratios([x + 1 + 1e-3, x])
    assert exact == 0.0 and ratio > 1
    with pytest.raises(AssertionError):
        budget.check([x + 1 + 1e-3, x])
    assert budget.ratios([x + 1, x])[0] <= 1
