import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch
from ov3fast.ops.layer_norm import layer_norm, reference


def inputs(rows: int, width: int):
    return testing.make(rows, 3, width), testing.make(width, seed=1), testing.make(width, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(("rows", "width"), [(2, 72), (1, 1), (0, 8), (5, 33)])
def test_parity(dtype, layout, rows, width):
    testing.check(layer_norm, reference, inputs(rows, width), dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual(dtype):
    x, weight, bias = inputs(4, 24)

    def ours(x, weight, bias, residual):
        return layer_norm(x, weight, bias, residual=residual)

    def plain(x, weight, bias, residual):
        return reference(x, weight, bias, residual=residual)

    testing.check(ours, plain, (x, weight, bias, testing.make(4, 3, 24, seed=3)), dtype=dtype, every_subset=True)


def with_residual(function):
    return lambda x, weight, bias, residual: function(x, weight, bias, residual=residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(3, 47), (22, 48), (65, 193), (1, 4097), (44, 768)])
def test_sizes_around_vectors_and_strips(dtype, rows, width):
    values = (*inputs(rows, width), testing.make(rows, 3, width, seed=3))
    testing.check(with_residual(layer_norm), with_residual(reference), values, dtype=dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 30),
    width=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
    residual=st.booleans(),
)
def test_any_shape_and_strides(rows, width, dtype, layout, residual):
    functions, values = (layer_norm, reference), inputs(rows, width)
    if residual:
        functions, values = map(with_residual, functions), (*values, testing.make(rows, 3, width, seed=3))
    testing.check(*functions, values, dtype=dtype, layout=testing.LAYOUTS[layout])


def test_mean_far_from_zero():
    x, weight, bias = inputs(5, 700)
    testing.check(layer_norm, reference, (x + 100, weight, bias), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype, implementation):
    if implementation in ("reference", "triton"):
        pytest.skip("PyTorch's sums depend on the number of threads, and a GPU's kernels have none")
    leaves = [v.to(dtype).requires_grad_() for v in (*inputs(70, 100), testing.make(70, 3, 100, seed=3))]

    def run():
        y, h = with_residual(layer_norm)(*leaves)
        return [y, h, *torch.autograd.grad(y.square().sum() + h.sum(), leaves)]

    testing.assert_same_bits_on_threads(run, (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(dtype, value):
    """A non-finite value in x affects only its row."""
    x, weight, bias = (v.to(dtype) for v in inputs(4, 21))
    x[1, 2, 20] = value
    y, expected = layer_norm(x, weight, bias), reference(x, weight, bias)
    assert torch.equal(y.isnan(), expected.isnan()) and int(y.isnan().sum()) == 21


def test_backend(implementation):
    x, weight, bias = (v.float() for v in inputs(2, 8))
    expected = {"reference": "eager", "triton": "triton"}.get(implementation, "cpu")
    word = _dispatch.request("layer_norm", None)
    for dtype in (torch.float32, torch.bfloat16):
        assert _dispatch.chosen("layer_norm", word, x.to(dtype), weight, bias, None, 1e-6) == expected
    assert _dispatch.chosen("layer_norm", "", x.double(), weight.double(), bias.double(), None, 1e-6) == "eager"


@pytest.mark.backend_independent
def test_gradcheck():
    leaves = [value.requires_grad_() for value in inputs(2, 5)]
    residual = testing.make(2, 3, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b, r: layer_norm(x, w, b, residual=r), (*leaves, residual))
    assert torch.autograd.gradcheck(lambda x, w, b, r: reference(x, w, b, residual=r), (*leaves, residual))


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    x, weight, bias = (v.float() for v in inputs(4, 8))
    x = testing.LAYOUTS[layout](x).requires_grad_()
    residual = torch.ones_like(x)
    for rest in (None, residual):
        torch.library.opcheck(torch.ops.ov3fast.layer_norm, (x, weight.requires_grad_(), bias.requires_grad_(), rest, 1e-6, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    x, weight, bias = (v.float().requires_grad_() for v in inputs(2, 8))
    compiled = torch.compile(lambda x, w, b: layer_norm(x, w, b).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(x, weight, bias).backward()
    got = x.grad.clone()
    x.grad = None
    layer_norm(x, weight, bias).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_float32_parameters_with_bfloat16_input():
    x, weight, bias = inputs(3, 16)
    y = layer_norm(x.bfloat16(), weight.float(), bias.float())
    exact = reference(x.bfloat16().double(), weight.float().double(), bias.float().double())
    assert y.dtype == torch.bfloat16
    testing.assert_within_budget(y, exact.bfloat16(), exact)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "layer_norm: x must be a tensor, got list"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x must be of dtype float32"),
        ({"x": torch.ones(2, 8, dtype=torch.float16)}, TypeError, "use bfloat16"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\) \[D\], got \(7,\)"),
        ({"weight": torch.ones(8).double()}, TypeError, "weight must be of dtype float32, got float64"),
        ({"residual": torch.ones(8)}, ValueError, "residual must have shape"),
        ({"impl": "nonsense"}, ValueError, "layer_norm: impl must be one of triton, cpu, eager; got 'nonsense'"),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **change}
    with pytest.raises(error, match=words):
        ops.layer_norm(**arguments)


@pytest.mark.full
@pytest.mark.large
@pytest.mark.backend_independent
def test_more_than_two_to_the_31_elements():
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8e9:
        pytest.skip("needs 8 GB of free memory")
    x = testing.make(64).bfloat16()
    one = torch.ones(64)
    rows = 2**25 + 3
    y = layer_norm(x.expand(rows, 64), one, one)
    assert y.numel() > 2**31
    expected = layer_norm(x[None], one, one)[0]
    for row in (0, 2**25 - 1, 2**25, rows - 1):
        assert torch.equal(y[row], expected), row
