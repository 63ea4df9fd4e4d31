import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _choice, _dispatch, cpu, triton
from ov3fast.ops.linear import linear, reference


def inputs(rows: int, k: int, n: int):
    return testing.make(rows, k), testing.make(n, k, seed=1, scale=k**-0.5 if k else 1.0), testing.make(n, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(("rows", "k", "n"), [(9, 7, 5), (1, 1, 1), (0, 3, 4), (4, 0, 3), (50, 33, 49)])
def test_parity(dtype, layout, rows, k, n):
    testing.check(linear, reference, inputs(rows, k, n), dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "k", "n"), [(193, 520, 97), (8, 1100, 48), (1030, 5, 3), (3, 2, 200)])
def test_parity_across_tiles(dtype, rows, k, n):
    testing.check(linear, reference, inputs(rows, k, n), dtype=dtype)


@pytest.mark.parametrize(("rows", "k", "n"), [(9, 7, 5), (50, 33, 49), (193, 520, 97), (0, 3, 4)])
def test_float32_parameters_beside_bfloat16(rows, k, n):
    x, weight, bias = (v.float() for v in inputs(rows, k, n))
    leaves = [x.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    wide = [v.detach().double().requires_grad_() for v in leaves]
    upstream = testing.make(rows, n, seed=5).bfloat16()

    def run(function, leaves):
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    for ours, plain, exact in zip(run(linear, leaves), run(reference, leaves), run(reference, wide), strict=True):
        assert ours.dtype == plain.dtype
        testing.assert_within_budget(ours, plain, exact)


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_large_calls(large_calls, dtype, layout):
    with ops.use("triton"):
        testing.check(linear, reference, inputs(50, 33, 49), dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=True)


@pytest.mark.backend_independent
def test_autocast_casts_x_alone():
    x, weight, bias = (v.float().requires_grad_() for v in inputs(4, 6, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.sum(), (x, weight, bias))} == {torch.float32}


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(1, 110)),
    layout=st.sampled_from(list(testing.LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    leading=st.booleans(),
)
def test_any_shape(implementation, shape, layout, dtype, leading):
    x, weight, bias = inputs(*shape)
    if leading:
        x = torch.stack([x, -x, 2 * x])
    testing.check(linear, reference, (x, weight, bias), dtype=dtype, layout=testing.LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype):
    x, weight, bias = (v.to(dtype).requires_grad_() for v in inputs(300, 65, 130))

    def run():
        y = linear(x, weight, bias)
        return [y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))]

    if implementation_is_ours(x, weight, bias):
        testing.assert_same_bits_on_threads(run)


def implementation_is_ours(*args) -> bool:
    return _dispatch.chosen("linear", _dispatch.request("linear", None), *args) == "cpu"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_values_stay_in_their_row(value, dtype):
    x, weight, bias = (v.to(dtype) for v in inputs(10, 9, 50))
    x[3, 8] = value
    ours, plain = linear(x, weight, bias), reference(x, weight, bias)
    assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.isinf(), plain.isinf())
    assert ours[[0, 1, 2, 4]].isfinite().all()


def test_kernel_is_chosen_where_it_was_built(implementation):
    x, weight, bias = (v.float() for v in inputs(3, 4, 5))
    ours = _choice.backend_for("linear", "forward", "fp32", (3, 4, 5)) if cpu.available_isas() else "eager"
    if implementation == "triton":  # which leaves parameters of x's dtype to PyTorch's own nodes
        ours = "eager"
        assert _dispatch.chosen("linear", "", x.bfloat16(), weight, bias) == "triton"
    assert _dispatch.chosen("linear", "", x, weight, bias) == ours
    assert _dispatch.chosen("linear", "", x.double(), weight.double(), bias.double()) == "eager"


@pytest.mark.backend_independent
def test_gradcheck():
    leaves = [value.requires_grad_() for value in inputs(3, 4, 2)]
    assert torch.autograd.gradcheck(linear, leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    x, weight, bias = (testing.LAYOUTS[layout](v.float()).requires_grad_() for v in inputs(4, 6, 3))
    for rest in (None, bias):
        torch.library.opcheck(torch.ops.ov3fast.linear, (x, weight, rest, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    x, weight, bias = (v.float().requires_grad_() for v in inputs(4, 6, 3))
    compiled = torch.compile(lambda x, w, b: linear(x, w, b).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(x, weight, bias).backward()
    got, weight.grad = weight.grad.clone(), None
    linear(x, weight, bias).square().sum().backward()
    torch.testing.assert_close(got, weight.grad)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "linear: x must have at least 1 dimension"),
        ({"x": torch.ones(2, 3).half()}, TypeError, "use bfloat16"),
        ({"weight": torch.ones(4, 5)}, ValueError, r"weight must have shape \(4, 3\)"),
        ({"weight": torch.ones(4)}, ValueError, "weight must have 2 dimensions"),
        ({"bias": torch.ones(3)}, ValueError, "bias must have shape"),
        ({"bias": torch.ones(4).bfloat16()}, TypeError, "bias must be of dtype float32"),
        ({"weight": torch.ones(4, 3).bfloat16()}, TypeError, "weight must be of dtype float32"),
        ({"impl": "mkl"}, ValueError, "impl must be one of triton, cpu, eager, onednn; got 'mkl'"),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4), **change}
    with pytest.raises(error, match=words):
        ops.linear(**arguments)
