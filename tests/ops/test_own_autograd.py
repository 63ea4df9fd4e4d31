"""If forward and backward both use PyTorch's products, PyTorch's own autograd runs them: no node of ours, the same results."""

import functools

import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops import _choice, _dispatch

pytestmark = pytest.mark.backend_independent

make = testing.make
CALLS = {
    "linear": (ops.linear, (make(2, 5, 8), make(6, 8, seed=1), make(6, seed=2))),
    "mlp": (ops.mlp, (make(2, 5, 8), make(12, 8, seed=1), make(12, seed=2), make(6, 12, seed=3), make(6, seed=4))),
    "layer_norm": (ops.layer_norm, (make(2, 5, 8), make(8, seed=1), make(8, seed=2))),
}  # fmt: skip
calls = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def choose(monkeypatch):
    """Call it with the backends that the measurements should select for forward and backward."""
    if not ops.cpu.available_isas():
        pytest.skip("the CPU kernels were not built")

    def by(forward, backward):
        taken = dict(zip(_choice.DIRECTIONS, (forward, backward), strict=True))
        monkeypatch.setattr(_choice, "backend_for", lambda op, direction, *_: taken[direction])
        _dispatch.forget_choices()

    monkeypatch.setattr(_dispatch, "_override", None)
    yield by
    monkeypatch.undo()
    _dispatch.forget_choices()


def leaves(name, dtype=torch.float32):
    return [value.to(dtype).requires_grad_() for value in CALLS[name][1]]


def nodes(out):
    """Names of all nodes of a graph."""
    found, seen = [out.grad_fn], set()
    for node in found:
        seen.add(node.name())
        found += [following for following, _ in node.next_functions if following is not None]
    return seen


@calls
def test_no_node_of_ours_where_both_directions_are_pytorchs(name, choose):
    for forward, backward, ours in (
        ("eager", "eager", False), ("cpu", "eager", True), ("eager", "cpu", True), ("cpu", "cpu", True),
    ):  # fmt: skip
        choose(forward, backward)
        found = any("ov3fast" in node for node in nodes(CALLS[name][0](*leaves(name))))
        assert found == ours, (forward, backward)


@calls
def test_the_backend_by_name_is_the_same_path(name):
    out = CALLS[name][0](*leaves(name), impl="eager")
    assert not any("ov3fast" in node for node in nodes(out))


@calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_contract(name, dtype, choose):
    """Each combination of backends for the two directions, with our nodes, against PyTorch's autograd alone."""
    function, found = CALLS[name][0], {}
    for pair in (("eager", "eager"), ("eager", "cpu"), ("cpu", "eager")):
        choose(*pair)
        values = leaves(name, dtype)
        out = function(*values)
        found[pair] = [out, *torch.autograd.grad(out, values, make(*out.shape, seed=9).to(dtype))]
    wide = [value.detach().to(dtype).double().requires_grad_() for value in CALLS[name][1]]
    out = function(*wide)
    exact = [out, *torch.autograd.grad(out, wide, make(*out.shape, seed=9).to(dtype).double())]
    plain = found.pop(("eager", "eager"))
    for values in found.values():
        for value, theirs, right in zip(values, plain, exact, strict=True):
            testing.assert_within_budget(value, theirs, right)
            assert theirs.is_contiguous() == value.is_contiguous()


@calls
def test_gradients_of_gradients(name, choose):
    choose("eager", "eager")
    values = [value.clone().requires_grad_() for value in CALLS[name][1]]
    assert torch.autograd.gradgradcheck(functools.partial(CALLS[name][0], impl="eager"), values)


@calls
def test_arguments_are_checked_all_the_same(name, choose):
    choose("eager", "eager")
    x, weight, *rest = leaves(name)
    with pytest.raises(ValueError, match=rf"{name}: \w+ must"):
        CALLS[name][0](x[..., :3], weight, *rest)
    with pytest.raises(TypeError, match=f"{name}: .* must be of dtype"):
        CALLS[name][0](x, weight.double(), *rest)


def test_float32_parameters_beside_bfloat16(choose):
    choose("eager", "eager")
    for name in ("linear", "mlp", "layer_norm"):
        x, *parameters = leaves(name)
        out = CALLS[name][0](x.detach().bfloat16().requires_grad_(), *parameters)
        assert out.dtype == torch.bfloat16
        assert {g.dtype for g in torch.autograd.grad(out.sum(), parameters)} == {torch.float32}


def test_under_autocast_nothing_is_narrowed_twice(choose):
    choose("eager", "eager")
    x, weight, bias = leaves("layer_norm", torch.bfloat16)
    plain = ops.layer_norm(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.layer_norm(x, weight, bias), plain)
