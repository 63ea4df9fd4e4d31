"""Plans of the CPU backend (ov3fast/ops/cpu/plan.py): they do the same as its functions for the calls that they apply to, and pass on others."""

import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops import _calls, _dispatch, cpu
from ov3fast.ops.cpu import plan as plans

pytestmark = [
    pytest.mark.backend_independent,
    pytest.mark.skipif(not cpu.available_isas(), reason="the CPU kernels were not built"),
]


@pytest.fixture(autouse=True)
def implementation(monkeypatch):
    """A plan at the second call, and none left behind."""
    monkeypatch.setattr(plans.Planned, "BEFORE", 1)
    _dispatch.forget_choices()
    yield
    _dispatch.forget_choices()


@pytest.fixture
def made(monkeypatch):
    """Every plan that was made."""
    made = []
    init = plans.Planned.__init__

    def keep(self, launcher):
        init(self, launcher)
        made.append(self)

    monkeypatch.setattr(plans.Planned, "__init__", keep)
    return made


def calls():
    for call in _calls.every():
        if "cpu" in ops.table()[call.op] and call.op != "adamw_ema_":
            for dtype in (torch.float32, torch.bfloat16):
                yield pytest.param(call, dtype, id=f"{call.name}-{dtype}")


def results(function, leaves):
    with ops.use("cpu"):
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    differentiable = [o for o in outputs if o.requires_grad]
    grads = ()
    if differentiable and leaves:
        grads = torch.autograd.grad(differentiable, leaves, [torch.ones_like(o) for o in differentiable], allow_unused=True)
    return [*(o.detach().clone() for o in outputs), *(g for g in grads if g is not None)]


UNPLANNED = {"contrastive_loss", "random_normal", "linear_cross_entropy"}
"""Ranks exchange rows within it; it takes a list; it looks at the labels."""


@pytest.mark.parametrize(("call", "dtype"), list(calls()))
def test_a_plan_does_what_the_function_does(call, dtype, made):
    def draw(*shape, scale=1.0):
        return testing.make(*shape, scale=scale)

    bound = _calls.Bound(call, call.make(draw, call.least, dtype), data=True)
    function = bound(call.function)
    first = results(function, bound.leaves)
    for _ in range(3):
        again = results(function, bound.leaves)
        assert len(first) == len(again) and all(map(torch.equal, first, again))
    planned = [hasattr(each.run, "source") for each in made if each.passed]
    assert call.op in UNPLANNED or all(planned) and planned


class Counted:
    """A backend's function that knows how often it ran."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.fixture
def counted(monkeypatch):
    backend = _dispatch._backends["layer_norm"]["cpu"]
    counted = Counted(backend.forward.inference)
    monkeypatch.setattr(backend.forward, "inference", counted)
    return counted


def norm(eps=1e-6):
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    y = ops.layer_norm(x, weight, bias, eps, impl="cpu")
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), weight, bias, eps))


def test_from_the_third_call_on_the_function_is_left_alone(counted):
    for _ in range(5):
        norm()
    assert counted.calls == 2


@pytest.mark.parametrize("what", ["float", "threads", "instruction set"])
def test_what_a_plan_does_not_apply_to_is_left_to_the_function(what, counted):
    for _ in range(3):
        norm()
    if what == "float":
        norm(eps=0.5)
    elif what == "threads":
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            norm()
        finally:
            torch.set_num_threads(threads)
    else:
        with cpu.use_isa("portable"):
            norm()
    assert counted.calls == 3
    norm()
    assert counted.calls == 3


def test_kinds_that_come_up_now_and_then_get_no_plan(counted, monkeypatch):
    monkeypatch.undo()
    for _ in range(plans.Planned.BEFORE):
        norm()
    selector = next(s for s in _dispatch._selectors if s.op == "layer_norm" and not s.backward)
    (selected,) = selector._choices.values()
    assert not hasattr(selected.inference.run, "source")
    norm()
    assert hasattr(selected.inference.run, "source")


def test_a_plan_refuses_wrong_labels_in_the_operator_s_words():
    hidden, weight, labels = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 4, -100, 2])
    for _ in range(4):
        ops.linear_cross_entropy(hidden, weight, labels, impl="cpu")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\) or be ignore_index=-100, got 5"):
        ops.linear_cross_entropy(hidden, weight, labels + 1, impl="cpu")


def test_the_callers_modes_see_a_planned_call_no_differently(counted):
    for _ in range(3):
        norm()
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    y = ops.layer_norm(x, weight, weight.clone(), impl="cpu")
    assert y.grad_fn is not None
    with torch.inference_mode():
        assert ops.layer_norm(x, weight, weight.clone(), impl="cpu").is_inference()
