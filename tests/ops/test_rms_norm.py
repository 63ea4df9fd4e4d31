import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch
from ov3fast.ops.rms_norm import reference, rms_norm


def inputs(rows: int, width: int):
    return testing.make(rows, 3, width), testing.make(width, seed=1), testing.make(rows, 3, width, seed=3)


def with_residual(function):
    return lambda x, weight, residual: function(x, weight, residual=residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(("rows", "width"), [(2, 72), (1, 1), (0, 8), (5, 33)])
def test_parity(dtype, layout, rows, width):
    values = inputs(rows, width)[:2]
    testing.check(rms_norm, reference, values, dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual(dtype):
    functions = map(with_residual, (rms_norm, reference))
    testing.check(*functions, inputs(4, 24), dtype=dtype, every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(3, 47), (22, 48), (65, 193), (1, 4097), (44, 768)])
def test_sizes_around_vectors_and_strips(dtype, rows, width):
    functions = map(with_residual, (rms_norm, reference))
    testing.check(*functions, inputs(rows, width), dtype=dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 30),
    width=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
)
def test_any_shape_and_strides(rows, width, dtype, layout):
    functions = map(with_residual, (rms_norm, reference))
    testing.check(*functions, inputs(rows, width), dtype=dtype, layout=testing.LAYOUTS[layout])


def test_is_torchs():
    x, weight, _ = inputs(3, 40)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (40,), weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype, implementation):
    if implementation in ("reference", "triton"):
        pytest.skip("PyTorch's sums depend on the number of threads, and a GPU's kernels have none")
    leaves = [v.to(dtype).requires_grad_() for v in inputs(70, 100)]

    def run():
        y, h = with_residual(rms_norm)(*leaves)
        return [y, h, *torch.autograd.grad(y.square().sum() + h.sum(), leaves)]

    testing.assert_same_bits_on_threads(run, (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(dtype, value):
    """NaN in x spoils its row; infinity makes NaN of itself and 0 of the rest, forward as in the reference."""
    x, weight, _ = (v.to(dtype) for v in inputs(4, 21))
    x[1, 2, 20] = value
    y, expected = rms_norm(x, weight), reference(x, weight)
    assert torch.equal(y.isnan(), expected.isnan()) and int(y.isnan().sum()) == (21 if value != value else 1)
    assert torch.equal(y[1, 2] == 0, expected[1, 2] == 0)


def test_backend(implementation):
    x, weight, _ = (v.float() for v in inputs(2, 8))
    expected = {"reference": "eager", "triton": "triton"}.get(implementation, "cpu")
    word = _dispatch.request("rms_norm", None)
    for dtype in (torch.float32, torch.bfloat16):
        assert _dispatch.chosen("rms_norm", word, x.to(dtype), weight, None, 1e-6) == expected
    assert _dispatch.chosen("rms_norm", "", x.double(), weight.double(), None, 1e-6) == "eager"


@pytest.mark.backend_independent
def test_gradcheck():
    leaves = [value.requires_grad_() for value in inputs(2, 5)]
    assert torch.autograd.gradcheck(with_residual(rms_norm), leaves)
    assert torch.autograd.gradcheck(with_residual(reference), leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    x, weight, residual = (v.float() for v in inputs(4, 8))
    x = testing.LAYOUTS[layout](x).requires_grad_()
    for rest in (None, residual):
        torch.library.opcheck(torch.ops.ov3fast.rms_norm, (x, weight.requires_grad_(), rest, 1e-6, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    x, weight, _ = (v.float().requires_grad_() for v in inputs(2, 8))
    compiled = torch.compile(lambda x, w: rms_norm(x, w).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(x, weight).backward()
    got = x.grad.clone()
    x.grad = None
    rms_norm(x, weight).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_float32_weight_with_bfloat16_input():
    x, weight, _ = inputs(3, 16)
    leaves = x.bfloat16().requires_grad_(), weight.float().requires_grad_()
    y = rms_norm(*leaves)
    exact = reference(*(leaf.double() for leaf in leaves))
    assert y.dtype == torch.bfloat16
    testing.assert_within_budget(y, exact.bfloat16(), exact)
    assert [grad.dtype for grad in torch.autograd.grad(y.sum(), leaves)] == [torch.bfloat16, torch.float32]


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "rms_norm: x must be a tensor, got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least 1 dimension"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\) \[D\], got \(7,\)"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"residual": torch.ones(8)}, ValueError, "residual must have shape"),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **change}
    with pytest.raises(error, match=words):
        ops.rms_norm(**arguments)
