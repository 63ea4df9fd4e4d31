import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch
from ov3fast.ops.swiglu import reference, swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(("rows", "hidden"), [(2, 36), (1, 1), (0, 8), (5, 33), (3, 0)])
def test_parity(dtype, layout, rows, hidden):
    testing.check(swiglu, reference, (testing.make(rows, 3, 2 * hidden),), dtype=dtype, layout=testing.LAYOUTS[layout])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    hidden=st.integers(1, 200),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
)
def test_any_shape_strides_and_scale(rows, hidden, scale, dtype, layout):
    values = (testing.make(rows, 3, 2 * hidden, scale=scale),)
    testing.check(swiglu, reference, values, dtype=dtype, layout=testing.LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_a_task(dtype):
    testing.check(swiglu, reference, (testing.make(9, 2 * 5461),), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype, implementation):
    if implementation in ("reference", "triton"):
        pytest.skip("a GPU's kernels have no threads, and PyTorch's are not ours to test")
    x = testing.make(70, 1000).to(dtype).requires_grad_()

    def run():
        y = swiglu(x)
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    testing.assert_same_bits_on_threads(run, (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite(dtype):
    """As in the reference, forward and backward."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 0.0, 1.0, -87.0, -90.0, -104.0])
    x = torch.cat([g.flatten() for g in torch.meshgrid(values, values, indexing="ij")]).to(dtype)
    found = testing.results(swiglu, [x], [0])
    expected = testing.results(reference, [x], [0])
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), plain.isnan())
        assert torch.equal(ours.isinf(), plain.isinf())


def test_backend(implementation):
    expected = {"reference": "eager", "triton": "triton"}.get(implementation, "cpu")
    word = _dispatch.request("swiglu", None)
    for dtype in (torch.float32, torch.bfloat16):
        assert _dispatch.chosen("swiglu", word, torch.ones(2, 8, dtype=dtype)) == expected
    assert _dispatch.chosen("swiglu", "", torch.ones(2, 8).double()) == "eager"


@pytest.mark.backend_independent
def test_gradcheck():
    leaf = testing.make(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, leaf) and torch.autograd.gradcheck(reference, leaf)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    x = testing.LAYOUTS[layout](testing.make(4, 8).float()).requires_grad_()
    torch.library.opcheck(torch.ops.ov3fast.swiglu, (x, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    x = testing.make(2, 8).float().requires_grad_()
    compiled = torch.compile(lambda x: swiglu(x).square().sum(), fullgraph=True, backend="aot_eager")
    [got] = torch.autograd.grad(compiled(x), x)
    [expected] = torch.autograd.grad(swiglu(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_the_graph_keeps_x_alone(implementation):
    if implementation == "reference":
        pytest.skip("PyTorch's own graph keeps silu(gate) too")
    kept = []
    x = testing.make(4, 16).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.data_ptr()) or value, lambda value: value):
        swiglu(x)
    assert kept == [x.data_ptr()]


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, "swiglu: x must be a tensor, got list"),
        (torch.ones(2, 7), ValueError, r"x must be \[..., 2 H\], gate and value side by side; got shape \(2, 7\)"),
        (torch.tensor(1.0), ValueError, r"got shape \(\)"),
        (torch.ones(2, 8, dtype=torch.int64), TypeError, "x must be of dtype float32"),
    ],
)
def test_errors(x, error, words):
    with pytest.raises(error, match=words):
        ops.swiglu(x)
