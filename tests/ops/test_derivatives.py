"""Derivatives beyond the backward, for every operator: correct, or a clear error. Meta tensors, FlopCounterMode, autocast."""

import importlib
import warnings

import pytest
import torch
from kernel_tools.samples import Sample
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from ov3fast import ops, testing
from ov3fast.ops import _calls, _dispatch, random

make = testing.make
RNG = random.make_rng(3)

pytestmark = pytest.mark.backend_independent


def case_of(call, apply=None):
    """(the operator, its specification, inputs): functions of the differentiable arguments, with one output."""
    sample = Sample(call)
    inputs = sample.inputs("least", torch.float64)
    positions = sample.leaves(inputs)

    def of_leaves(function):
        def run(*leaves):
            arguments = [value.to(leaves[0].device) for value in inputs]
            for i, leaf in zip(positions, leaves, strict=True):
                arguments[i] = leaf
            value = (apply or call.apply)(function, *arguments)
            return value if isinstance(value, torch.Tensor) else sum(output.sin() for output in value)

        return run

    return of_leaves(call.function), of_leaves(call.reference), tuple(inputs[i] for i in positions)


def summed(function, hidden, weight, labels):
    return function(hidden, weight, labels, reduction="sum")


CASES = {
    call.name: case_of(call)
    for call in _calls.every()
    if call.differentiable and call.label not in ("all labelled", "gelu_tanh")
}
TOTAL = next(call for call in _calls.every() if call.op == "linear_cross_entropy_total")
CASES["linear_cross_entropy_total-sum"] = case_of(TOTAL, summed)
DTYPES = [torch.float64, torch.float32]
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("number", [0, 1], ids=["wide", "single"])


def tangents(inputs):
    return tuple(make(*value.shape, seed=9).to(value.dtype) for value in inputs)


def penalty(function, inputs):
    """The gradient of the squared gradient."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves, allow_unused=True)


def third_order(function, inputs):
    leaves = [value.clone().requires_grad_() for value in inputs]
    total = function(*leaves).sin().sum()
    for _ in range(2):
        grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        total = sum(grad.square().sum() for grad in grads if grad is not None)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def jvp(function, inputs):
    return torch.func.jvp(function, tuple(inputs), tangents(inputs))


def dual_level(function, inputs):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents(inputs)))).tangent


def func_grad(function, inputs):
    return torch.func.grad(lambda *values: function(*values).square().sum(), argnums=tuple(range(len(inputs))))(*inputs)


def hessian(function, inputs):
    return torch.func.hessian(lambda value: function(value, *inputs[1:]).square().sum())(inputs[0])


def jacobian(function, inputs):
    return torch.func.jacrev(function)(*inputs)


def batched(function, inputs):
    return torch.func.vmap(lambda value: function(value, *inputs[1:]))(torch.stack([inputs[0], 2 * inputs[0]]))


def flat(values):
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [torch.zeros(()) if t is None else t.detach() for v in values for t in (v if isinstance(v, (tuple, list)) else (v,))]


@cases
@dtypes
@pytest.mark.parametrize("derivative", [penalty, third_order, jvp, dual_level, func_grad, hessian, jacobian, batched])
def test_is_the_specifications(case, number, derivative):
    ours, plain, values = CASES[case]
    inputs = [value.to(DTYPES[number]) for value in values]
    expected = flat(derivative(plain, inputs))
    keeps_gradients = "total" in case and number == 1
    if keeps_gradients and derivative in (penalty, third_order):
        with pytest.raises(NotImplementedError, match="linear_cross_entropy can with reduction='none'"):
            derivative(ours, inputs)
        return
    exact = flat(derivative(plain, [value.double() for value in inputs]))
    for actual, same, wide in zip(flat(derivative(ours, inputs)), expected, exact, strict=True):
        # Sums are in another order than the specification's: an a-priori bound for a chain of a hundred roundings.
        scale = float(wide.abs().max()) if wide.numel() else 0.0
        assert testing.error(actual, wide) <= 2 * testing.error(same, wide) + 100 * torch.finfo(actual.dtype).eps * (1 + scale)


@pytest.mark.parametrize("case", ["linear", "flash_attention"])
def test_a_backend_that_is_asked_for_says_why_not(case):
    ours, _, inputs = CASES[case]
    function = {"linear": ops.linear, "flash_attention": ops.flash_attention}[case]
    with pytest.raises(NotImplementedError, match=f"{case}: impl='cpu' has no forward-mode"):
        torch.func.jvp(lambda *values: function(*values, impl="cpu"), inputs, tangents(inputs))


@cases
def test_meta_tensors(case):
    function, _, values = CASES[case]
    here = function(*(value.float() for value in values))
    leaves = [value.float().to("meta").requires_grad_() for value in values]
    result = function(*leaves)
    grads = torch.autograd.grad(result, leaves, torch.ones_like(result))
    assert result.is_meta and result.shape == here.shape and result.dtype == here.dtype
    assert all(grad.is_meta and grad.shape == leaf.shape for grad, leaf in zip(grads, leaves, strict=True))


@cases
def test_flops_are_counted(case):
    """As many as PyTorch counts for the specification, plus what the backward recomputes."""
    function, plain, values = CASES[case]

    def count(run):
        leaves = [value.float().requires_grad_() for value in values]
        with FlopCounterMode(display=False) as forward:
            result = run(*leaves)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(result, leaves, torch.ones_like(result))
        return forward.get_total_flops(), backward.get_total_flops()

    ours, theirs = count(function), count(plain)
    if "total" in case:  # the forward computes the gradients
        assert ours == (sum(theirs), 0)
    elif case.startswith(("flash", "contrastive", "linear_cross")):
        assert ours == (theirs[0], theirs[1] + theirs[0] // (2 if case.startswith("flash") else 1))
    else:
        assert ours == theirs


def test_random_and_adamw_on_meta_tensors():
    assert random.normal((3,), RNG.to("meta")).is_meta
    lists = [[torch.empty(3, device="meta")] for _ in range(4)]
    assert ops.adamw_ema_(*lists, step=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0).is_meta


@pytest.mark.parametrize("place", range(5), ids=["params", "grads", "exp_avgs", "exp_avg_sqs", "ema"])
def test_an_update_in_place_says_that_it_has_no_derivative(place):
    """Otherwise the result would be zeros: tangents and torch.func's gradients don't pass through in-place writes."""

    def update(value):
        lists = [[torch.ones(3)] for _ in range(5)]
        lists[place] = [value]
        return (
            ops.adamw_ema_(*lists, step=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, ema_decay=0.9)
            + lists[0][0].sum()
        )

    one = torch.ones(3)
    for derivative in (
        lambda: torch.func.grad(update)(one),
        lambda: torch.func.jvp(update, (one,), (one,)),
        lambda: torch.func.vmap(update)(torch.ones(2, 3)),
        lambda: dual_level(update, (one,)),
    ):
        with pytest.raises(NotImplementedError, match=r"adamw_ema_: \w+\[0\] is differentiated or batched"):
            derivative()
    assert update(one).shape == ()


def test_random_numbers_are_constants():
    """No input of random.normal is differentiable: derivatives ignore it, and it counts no FLOPs."""
    here = random.normal((3,), RNG)
    x, tangent = torch.arange(3.0), torch.ones(3)
    value, found = torch.func.jvp(lambda x: x * random.normal((3,), RNG), (x,), (tangent,))
    assert torch.equal(value, x * here) and torch.equal(found, here)
    assert torch.equal(torch.func.grad(lambda x: (x * random.normal((3,), RNG)).sum())(x), here)
    assert torch.equal(torch.func.vmap(lambda x: x + random.normal((3,), RNG))(torch.zeros(2, 3)), here.expand(2, 3))
    with FlopCounterMode(display=False) as counted:
        random.normal((3,), RNG)
        ops.adamw_ema_(*([torch.ones(3)] for _ in range(4)), step=1, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    assert counted.get_total_flops() == 0


def test_contrastive_loss_casts_under_autocast():
    image, text, scale = make(5, 8).float(), make(5, 8, seed=1).bfloat16(), torch.tensor(3.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.contrastive_loss(image, text, scale)
    assert loss.dtype == torch.float32 and torch.equal(loss, ops.contrastive_loss(image.bfloat16(), text, scale))


def test_one_warning_for_swapped_axes(monkeypatch):
    module = importlib.import_module("ov3fast.ops.flash_attention")
    monkeypatch.setattr(module, "_warned", False)
    _dispatch.forget_choices()  # calls with a signature seen before are not checked again
    right = make(1, 9, 3, 4).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.flash_attention(right, right, right)
        few = make(1, 2, 5, 4).float()  # fewer tokens than heads, laid out as they should be
        ops.flash_attention(few, few, few)
    swapped = right.transpose(1, 2)
    with pytest.warns(UserWarning, match=r"flash_attention takes \[B,N,H,D\]") as caught:
        ops.flash_attention(swapped, swapped, swapped)
        ops.flash_attention(swapped, swapped, swapped)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_tensor_that_outlived_its_transform():
    """It is a wrapper without memory of its own."""
    kept = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(make(2, 3, 8).float())
    weight = make(8, 8, seed=1).float()
    expected = ops.linear(make(2, 3, 8).float(), weight)
    assert torch.equal(ops.linear(kept[0], weight), expected)
    assert torch.equal(ops.linear(kept[0], weight.requires_grad_()), expected)
