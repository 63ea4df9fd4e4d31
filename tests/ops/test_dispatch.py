"""Backend selection: registration, requests, automatic choice and its cache, on a toy operator.

Its backends multiply by different numbers, so that a result identifies the backend.
"""

import pytest
import torch
from kernel_tools.host_time import Plain, events
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ov3fast import ops
from ov3fast.ops import _dispatch, _operator

pytestmark = pytest.mark.backend_independent

SCHEMA = "(Tensor x, int n, float scale) -> Tensor"
BACKWARD = "(Tensor grad_y, Tensor x, bool need_x) -> Tensor"


def save(inputs, output):
    return _operator.Saved((inputs[0],))


checked = []


def check(x, n, scale):
    checked.append(n)
    if not isinstance(x, Tensor):
        raise TypeError(f"toy: x must be a tensor, got {type(x).__name__}")
    if n < 0:
        raise ValueError(f"toy: n must be at least 0, got {n}")


TOY = _operator.define(
    "toy",
    SCHEMA,
    fake=lambda x, n, scale: torch.empty_like(x),
    specification=lambda x, n, scale: x * 1,
    check=check,
    autocast=("x",),
    save=save,
    gradients={"x": 0},
    backward_schema=BACKWARD,
    backward_fake=lambda grad_y, x, need_x: torch.empty_like(x),
    differentiable_backward=lambda grad_y, x, need_x: grad_y * 1,
)


def times(factor):
    return {
        "forward": lambda x, n, scale: x * factor,
        "backward": lambda grad_y, x, need_x: grad_y * factor,
    }


@pytest.fixture(autouse=True)
def backends(monkeypatch, implementation):
    """The operator without backends; restores names and order afterwards."""
    monkeypatch.setattr(_dispatch, "_override", None)
    monkeypatch.setattr(_dispatch, "_order", list(_dispatch._order))
    monkeypatch.setitem(_dispatch._backends, "toy", {})
    checked.clear()
    yield _dispatch._backends["toy"]
    _dispatch.forget_choices()


@pytest.fixture
def x():
    return torch.ones(2, 3)


def register(name, factor, *, forward_only=False, **options):
    functions = times(factor)
    _dispatch.register("toy", name, functions["forward"], None if forward_only else functions["backward"], **options)


def ran(x, n=0, scale=1.0, impl=None):
    """The factor of the backend that ran the forward."""
    return TOY(impl, x, n, scale).flatten()[0].item()


def gradient(x, impl=None):
    """The factors of the backends that ran forward and backward."""
    leaf = x.clone().requires_grad_()
    y = TOY(impl, leaf, 0, 1.0)
    return y[0, 0].item(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0][0, 0].item()


# ---- registration ----------------------------------------------------------------------------------------------------


def test_order_is_that_of_preference_not_of_registration(x):
    register("eager", 2)
    register("cpu", 3)
    register("sdpa", 5)
    assert ran(x) == 3 and list(ops.table()["toy"]) == ["cpu", "sdpa", "eager"]


def test_a_new_name_comes_last(x):
    register("eager", 2)
    register("mine", 7)
    assert ran(x) == 2 and ran(x, impl="mine") == 7
    assert list(ops.table()["toy"]) == ["eager", "mine"]


def test_a_new_name_before_another(x):
    register("eager", 2)
    register("cpu", 3)
    register("mine", 7, before="cpu")
    assert ran(x) == 7 and list(ops.table()["toy"]) == ["mine", "cpu", "eager"]
    register("mine", 11, before="eager")  # known by now: the place stays
    assert ran(x) == 11 and list(ops.table()["toy"]) == ["mine", "cpu", "eager"]


@pytest.mark.parametrize(
    ("name", "before", "words"),
    [
        ("mine", "cqu", r"toy: before must be one of cuda, triton, .*eager, onednn, got 'cqu'"),
        ("", None, "toy: a backend can't be called ''"),
        ("reference", None, "toy: a backend can't be called 'reference'"),
    ],
)
def test_names_that_are_refused(name, before, words):
    with pytest.raises(ValueError, match=words):
        register(name, 2, before=before)
    assert "toy" not in ops.table() or not ops.table()["toy"]
    assert name not in _dispatch._order


def test_registering_again_replaces(x):
    register("eager", 2)
    assert ran(x) == 2
    register("eager", 3)
    assert ran(x) == 3


def test_table_tells_reasons():
    register("cpu", 2, unavailable_reason=lambda: "no compiler")
    register("eager", 3)
    assert ops.table()["toy"] == {"cpu": "no compiler", "eager": "ready"}


# ---- requests --------------------------------------------------------------------------------------------------------


def test_impl_then_use_then_automatic(x):
    for name, factor in (("cpu", 2), ("sdpa", 3), ("eager", 5)):
        register(name, factor)
    assert ran(x) == 2
    with ops.use("sdpa"):
        assert ran(x) == 3 and ran(x, impl="eager") == 5
        with ops.use("eager"):
            assert ran(x) == 5
        assert ran(x) == 3
    assert ran(x) == 2


def test_use_of_a_backend_that_the_operator_lacks_leaves_it_to_choose(x):
    register("cpu", 2)
    with ops.use("triton"):
        assert ran(x) == 2
    with pytest.raises(ValueError, match=r"toy: impl must be one of cpu; got 'triton'"):
        ran(x, impl="triton")


def test_use_ends_with_an_error(x):
    register("cpu", 2)
    register("eager", 3)
    with pytest.raises(KeyError), ops.use("eager"):
        raise KeyError
    assert ran(x) == 2


def test_unknown_names():
    with (
        pytest.raises(ValueError, match=r"impl must be one of .*; got 'gpu' \(argument, ops.use or OV3FAST_IMPL\)"),
        ops.use("gpu"),
    ):
        pass
    register("eager", 2)
    with pytest.raises(ValueError, match="toy: impl must be one of eager; got 'gpu'"):
        TOY("gpu", torch.ones(1), 0, 1.0)


def test_the_environment_s_word(monkeypatch, x):
    register("cpu", 2)
    register("eager", 3)
    monkeypatch.setattr(_dispatch, "_override", "eager")
    assert ran(x) == 3
    monkeypatch.setattr(_dispatch, "_override", "egaer")
    with pytest.raises(ValueError, match="got 'egaer'"):
        ran(x)


def test_alias(x):
    register("cpu", 2)
    register("eager", 3)
    assert _dispatch.decode("reference") == "eager" and _dispatch.decode("cpu") == "cpu"
    assert _dispatch.request("toy", "reference") == "eager" and ran(x, impl="reference") == 3
    with ops.use("reference"):
        assert ran(x) == 3
    assert torch.ops.ov3fast.toy(x, 0, 1.0, "reference")[0, 0] == 3
    assert _dispatch.chosen("toy", "reference", x, 0, 1.0) == "eager"


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_obstacles_pass_a_call_on(x):
    register("cuda", 2, unavailable_reason=lambda: "no device")
    register("cpu", 3, operands=("x", "n"), unsupported_reason=lambda x, n: "n is odd" if n % 2 else None)
    register("eager", 5)
    assert ran(x, n=2) == 3 and ran(x, n=1) == 5
    with pytest.raises(RuntimeError, match="toy: impl='cuda' can't run this call: no device"):
        ran(x, impl="cuda")
    with pytest.raises(RuntimeError, match="toy: impl='cpu' can't run this call: n is odd"):
        ran(x, n=1, impl="cpu")


def test_no_backend_left(x):
    register("cpu", 3, unsupported_reason=lambda: "never")
    with pytest.raises(RuntimeError, match="toy: no backend takes this call; see `ov3fast doctor`"):
        ran(x)


def test_slower_than_gives_way_to_the_first_that_can(x):
    register("sdpa", 2, operands=("n",), unsupported_reason=lambda n: "n is 1" if n == 1 else None)
    register("eager", 3)
    register("cpu", 5, operands=("n",), slower_than=lambda n: ("triton", "sdpa", "eager") if n else ())
    assert ran(x, n=0) == 5  # nothing is faster
    assert ran(x, n=2) == 2  # triton isn't there
    assert ran(x, n=1) == 3  # nor can sdpa take this one
    assert ran(x, n=2, impl="cpu") == 5  # asked for


def test_slower_than_backward_is_its_own(x):
    register("eager", 2)
    register("cpu", 3, slower_than_backward=lambda: ("eager",))
    assert gradient(x) == (3, 2)
    register("cpu", 3, slower_than=lambda: ("eager",))
    assert gradient(x) == (2, 2)
    register("cpu", 3, slower_than=lambda: ("eager",), slower_than_backward=lambda: ())
    assert gradient(x) == (2, 3)


def test_empty_calls_go_to_eager():
    nothing = torch.ones(0, 3)
    register("cpu", 2)
    assert TOY(None, nothing, 0, 1.0).shape == (0, 3)  # cpu, where there is no eager
    register("eager", 3)
    assert _dispatch.chosen("toy", "", nothing, 0, 1.0) == "eager"
    assert _dispatch.chosen("toy", "cpu", nothing, 0, 1.0) == "eager"
    assert _dispatch.chosen("toy", "", torch.ones(1), 0, 1.0) == "cpu"
    register("cpu", 2, unsupported_reason=lambda: "never")
    with pytest.raises(RuntimeError, match="can't run this call: never"):  # even so a request is held to its backend
        TOY("cpu", nothing, 0, 1.0)
    register("cpu", 2)
    register("eager", 3, unsupported_reason=lambda: "never")
    assert _dispatch.chosen("toy", "", nothing, 0, 1.0) == "cpu"


def test_backward_of_a_forward_only_backend(x):
    register("cpu", 2, forward_only=True)
    register("sdpa", 3)
    register("eager", 5)
    assert gradient(x) == (2, 3)
    assert gradient(x, impl="cpu") == (2, 3)
    assert gradient(x, impl="eager") == (5, 5)


def test_backward_keeps_the_forward_s_request(x):
    register("cpu", 2)
    register("eager", 3)
    leaf = x.clone().requires_grad_()
    with ops.use("eager"):
        y = TOY(None, leaf, 0, 1.0)
    assert torch.autograd.grad(y, leaf, torch.ones_like(y))[0][0, 0] == 3


# ---- what is remembered ----------------------------------------------------------------------------------------------


def counted(answers):
    """An unsupported_reason that counts its calls."""

    def reason(*operands):
        answers.append(operands)

    return reason


def test_a_choice_is_remembered_by_what_tensors_look_like(x):
    asked = []
    register("cpu", 2, operands=("x",), unsupported_reason=counted(asked))
    for _ in range(3):
        ran(x), ran(x + 1)
    assert len(asked) == 1
    for other in (torch.ones(2, 4), torch.ones(3, 2).t(), x.double()):
        before = len(asked)
        ran(other), ran(other)
        assert len(asked) == before + 1


def test_ints_tell_choices_apart_and_floats_do_not(x):
    asked = []
    register("cpu", 2, unsupported_reason=counted(asked))
    for scale in (1.0, 2.0, 3.0):
        ran(x, n=1, scale=scale)
    assert len(asked) == 1
    ran(x, n=2)
    assert len(asked) == 2


def test_alignment_tells_choices_apart_where_it_matters(x):
    register("eager", 2)
    room = torch.ones(16)
    for matters in (False, True):
        selector = _dispatch.Selector("toy", SCHEMA, backward=False, inputs=["x"], alignment_matters=matters)
        for offset in (0, 1, 4):
            selector("", (room[offset : offset + 4], 0, 1.0))
        assert len(selector._choices) == (2 if matters else 1)
        _dispatch._selectors.remove(selector)


def test_lists_are_not_remembered(x):
    asked = []
    register("eager", 2, unsupported_reason=counted(asked))
    selector = _dispatch.Selector("toy", "(Tensor[] xs, int n) -> Tensor", backward=False, inputs=[])
    for _ in range(2):
        selector("", ([x], 0))
    assert len(asked) == 2 and not selector._choices
    _dispatch._selectors.remove(selector)


def test_forget_choices(x):
    answer = [None]
    register("cpu", 2, unavailable_reason=lambda: answer[0])
    register("eager", 3)
    assert ran(x) == 2
    answer[0] = "gone"
    assert ran(x) == 2
    _dispatch.forget_choices()
    assert ran(x) == 3


def test_memory_is_bounded(x):
    register("eager", 2)
    for n in range(4100):
        TOY.select("", (x, n, 1.0))
    assert 0 < len(TOY.select._choices) < 4096


def test_a_known_kind_asks_for_nothing_but_its_function(x, monkeypatch):
    register("eager", 2)
    ran(x)
    monkeypatch.setattr(TOY, "_call_new", None)
    assert ran(x.clone(), scale=3.0) == 2
    with pytest.raises(TypeError, match="not callable"):
        ran(x, n=5)


def test_known_kinds_are_bounded(x):
    register("eager", 2)
    for n in range(3 * _operator.KINDS):
        assert ran(x, n=n) == 2
    assert [len(kinds) for kinds in TOY.select.kinds.values()] == [_operator.KINDS]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Toy(torch.nn.Module):
    def forward(self, x):
        return TOY(None, x, 0, 1.0)


def test_whatever_must_see_a_call_of_a_known_kind_sees_it(x):
    """The backend multiplies by 2, the specification, which transforms run, by 1."""
    register("eager", 2)
    ran(x), ran(x.clone().requires_grad_())
    assert sum(map(len, TOY.select.kinds.values())) > 1

    with Seen() as mode:
        assert ran(x) == 2
    assert "ov3fast.toy.default" in mode.names
    assert torch.equal(torch.func.vmap(lambda row: TOY(None, row, 0, 1.0))(x), x)
    with forward_ad.dual_level():
        out = TOY(None, forward_ad.make_dual(x, 3 * x), 0, 1.0)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, 3 * x)
    assert torch.equal(torch.func.grad(lambda x: TOY(None, x, 0, 1.0).sum())(x), 2 * x)
    with torch.autocast("cpu", torch.bfloat16):
        assert TOY(None, x, 0, 1.0).dtype == torch.bfloat16
    with FakeTensorMode() as fake:
        assert TOY(None, fake.from_tensor(x), 0, 1.0).shape == x.shape
    assert TOY(None, x.to("meta"), 0, 1.0).is_meta
    exported = torch.export.export(Toy(), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=False)
    assert "ov3fast.toy" in exported.graph_module.code
    graphs = []
    compiled = torch.compile(
        lambda x: TOY(None, x, 0, 1.0), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True
    )
    assert torch.equal(compiled(x), 2 * x) and "ov3fast.toy" in graphs[0].code
    traced = torch.jit.trace(lambda x: TOY(None, x, 0, 1.0), (x,))
    assert "ov3fast::toy" in str(traced.graph)


@pytest.mark.parametrize("first", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_known_kinds_tell_gradients_apart(x, first):
    register("eager", 2)
    leaf = x.clone().requires_grad_()
    with first():
        TOY(None, leaf, 0, 1.0)
    for _ in range(2):
        assert TOY(None, x, 0, 1.0).grad_fn is None
        assert TOY(None, leaf, 0, 1.0).grad_fn is not None
        with torch.no_grad():
            assert TOY(None, leaf, 0, 1.0).grad_fn is None
        with torch.inference_mode():
            assert TOY(None, leaf, 0, 1.0).is_inference()
        (grad,) = torch.autograd.grad(TOY(None, leaf, 0, 1.0).sum(), leaf)
        assert torch.equal(grad, 2 * x)


def test_known_kinds_are_of_plain_values(x):
    register("eager", 2)
    assert ran(x, n=1) == 2
    assert ran(torch.nn.Parameter(x), n=1) == 2
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        TOY(None, x, torch.ones(3), 1.0)


def test_a_tensor_that_is_passed_twice():
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    for _ in range(3):
        apart = ops.layer_norm(x, weight, bias, impl="eager")
        twice = ops.layer_norm(x, weight, weight, impl="eager")
        assert torch.equal(twice, torch.nn.functional.layer_norm(x, (8,), weight, weight, 1e-6))
        assert torch.equal(apart, torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-6))


def test_alignment_tells_known_kinds_apart():
    room, weight, bias = torch.randn(100), torch.ones(6), torch.zeros(6)
    for offset in (0, 1, 0, 2):
        x = room[offset : offset + 24].view(1, 6, 2, 2)
        found = ops.group_norm_silu(x, 2, weight, bias, impl="eager")
        torch.testing.assert_close(found, ops.group_norm_silu(x.clone(), 2, weight, bias, impl="eager"))
    selector = next(s for s in _dispatch._selectors if s.op == "group_norm_silu" and not s.backward)
    (kinds,) = (kinds for (_, _, _, shape, *_), kinds in selector.kinds.items() if shape == x.shape)
    assert len(kinds) == 3


def test_chosen_asks_anew(x):
    answer = [None]
    register("cpu", 2, unavailable_reason=lambda: answer[0])
    register("eager", 3)
    assert ran(x) == 2
    answer[0] = "gone"
    assert _dispatch.chosen("toy", "", x, 0, 1.0) == "eager"


# ---- checks ----------------------------------------------------------------------------------------------------------


def test_arguments_are_checked_once_per_kind_of_call(x):
    register("eager", 2)
    for _ in range(3):
        ran(x, n=1)
    assert checked == [1]
    ran(x, n=2), ran(torch.ones(5), n=2), ran(x.clone().requires_grad_(), n=1)
    assert checked == [1, 2, 2]


def test_wrong_arguments_are_refused_every_time(x):
    register("eager", 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="n must be at least 0, got -1"):
            ran(x, n=-1)
        with pytest.raises(TypeError, match="x must be a tensor, got list"):
            TOY(None, [1.0], 0, 1.0)
        with pytest.raises(TypeError, match="x must be a tensor, got NoneType"):
            TOY(None, None, 0, 1.0)
    assert checked == [-1, 0, 0] * 2


def test_calls_that_a_mode_or_compiler_sees_are_checked(x):
    register("eager", 2)
    with pytest.raises(ValueError, match="n must be at least 0, got -3"):
        TOY(None, x.to("meta"), -3, 1.0)
    with pytest.raises(ValueError, match="n must be at least 0, got -4"):
        torch.func.vmap(lambda row: TOY(None, row, -4, 1.0))(x)


def test_autocast_casts_what_the_operator_names(x):
    register("eager", 2)
    assert TOY(None, x, 0, 1.0).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert TOY(None, x, 0, 1.0).dtype == torch.bfloat16
        assert TOY(None, x.double(), 0, 1.0).dtype == torch.float64


# ---- schemas ---------------------------------------------------------------------------------------------------------


def test_parse_schema():
    schema = "(Tensor(a!)[] params, Tensor? bias, SymInt[] shape, float eps) -> (Tensor y, Tensor h)"
    assert _dispatch.parse_schema(schema) == [
        ("Tensor[]", "params"), ("Tensor?", "bias"), ("SymInt[]", "shape"), ("float", "eps"),
    ]  # fmt: skip


# ---- host time -------------------------------------------------------------------------------------------------------


X, WEIGHT, BIAS = torch.ones(2, 3, 8), torch.ones(8, 8), torch.ones(8)
CALLS = {
    "layer_norm": (ops.layer_norm, (X, BIAS + 1, BIAS), 40, 92),
    "linear": (ops.linear, (X, WEIGHT, BIAS), 33, 76),
    "flash_attention": (ops.flash_attention, tuple(torch.ones(1, 2, 1, 8) for _ in range(3)), 42, 91),
    "mlp": (ops.mlp, (X, WEIGHT, BIAS, WEIGHT + 1, BIAS + 1), 44, 111),
}
"""operator -> function, arguments, most calls in a forward, and in forward plus backward minus PyTorch's own."""


@pytest.mark.skipif(not ops.cpu.available_isas(), reason="the CPU kernels were not built")
@pytest.mark.parametrize("op", CALLS)
def test_calls_within_a_call(op):
    """Host time, measured in function calls; `python -m benches.host` gives microseconds."""
    function, values, forward, both = CALLS[op]
    leaves = [value.clone().requires_grad_() for value in values]
    upstream = torch.ones_like(function(*values, impl="cpu"))
    assert events(lambda: function(*values, impl="cpu")) <= forward
    pytorch = events(lambda: torch.autograd.grad(Plain.apply(leaves[0]), leaves[:1], upstream))
    assert events(lambda: torch.autograd.grad(function(*leaves, impl="cpu"), leaves, upstream)) - pytorch <= both


@pytest.mark.backend_independent
def test_without_kernels_the_instruction_set_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(ops.cpu, "available_isas", lambda: ())
    with pytest.raises(RuntimeError, match="the CPU kernels were not built"):
        ops.cpu.isa()
