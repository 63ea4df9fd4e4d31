import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.mlp import mlp, reference


def inputs(*lead: int, width=9, hidden=13, features=5):
    """x, w1, b1, w2, b2."""
    return (
        testing.make(*lead, width),
        testing.make(hidden, width, seed=1, scale=0.5),
        testing.make(hidden, seed=2),
        testing.make(features, hidden, seed=3, scale=0.5),
        testing.make(features, seed=4),
    )


def both(activation="gelu"):
    return lambda *a: mlp(*a, activation=activation), lambda *a: reference(*a, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(
    ("lead", "width", "hidden", "features"),
    [((3, 7), 33, 65, 17), ((1, 1), 1, 1, 1), ((0, 4), 8, 3, 2), ((2, 3), 8, 0, 2), ((2, 0, 3), 8, 3, 2), ((4,), 7, 5, 3)],
)
def test_parity(dtype, layout, lead, width, hidden, features):
    values = inputs(*lead, width=width, hidden=hidden, features=features)
    testing.check(*both(), values, dtype=dtype, layout=testing.LAYOUTS[layout])


# Of the CPU kernels' tiles and threads, and too many programs for the interpreter.
MANY_ROWS = [] if triton.INTERPRETED else [(2049, 9, 17, 5), (4100, 3, 50, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "features"),
    [(8, 47, 49, 48), (9, 48, 193, 1), (193, 1, 97, 47), (200, 193, 530, 95), *MANY_ROWS],
)
def test_tile_borders(dtype, rows, width, hidden, features):
    testing.check(*both(), inputs(rows, width=width, hidden=hidden, features=features), dtype=dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(0, 70)] * 4),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(["gelu", "gelu_tanh"]),
)
def test_any_shape(sizes, layout, dtype, activation):
    rows, width, hidden, features = sizes
    values = inputs(rows, width=width, hidden=hidden, features=features)
    testing.check(*both(activation), values, dtype=dtype, layout=testing.LAYOUTS[layout])


def results(*values):
    leaves = [v.detach().requires_grad_() for v in values]
    y = mlp(*leaves)
    return [y, *torch.autograd.grad(y, leaves, testing.make(*y.shape, seed=9).to(y))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [20, 2500])
def test_threads_do_not_change_the_bits(implementation, dtype, rows):
    if implementation in ("reference", "triton"):
        pytest.skip("PyTorch's own sums depend on threads, and a GPU's kernels have none")
    values = [v.to(dtype) for v in inputs(rows, width=49, hidden=70, features=33)]
    testing.assert_same_bits_on_threads(lambda: results(*values))


def test_the_kernels_are_chosen(implementation):
    ours = "triton" if implementation == "triton" else "cpu"
    for dtype, name in ((torch.float32, ours), (torch.bfloat16, ours), (torch.float64, "eager")):
        arguments = *(v.to(dtype) for v in inputs(2)), "gelu"
        assert implementation == "reference" or _dispatch.chosen("mlp", "", *arguments) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_rows(dtype, value):
    values = [v.to(dtype) for v in inputs(12)]
    values[0][5, 3] = value
    y, grad_x, *_ = results(*values)
    bad = torch.arange(12) == 5
    assert not y[bad].isfinite().any() and y[~bad].isfinite().all() and grad_x[~bad].isfinite().all()


def test_activations_far_out():
    one = torch.ones(1, 1)
    x = torch.tensor([-1e30, -50.0, -9.0, 0.0, 9.0, 50.0, 1e30])[:, None]
    for activation in ("gelu", "gelu_tanh"):
        torch.testing.assert_close(mlp(x, one, None, one, None, activation=activation), x.clamp(min=0), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_subset_of_gradients(activation, dtype):
    testing.check(*both(activation), inputs(2, 3), dtype=dtype, every_subset=True)


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [6, 200])
def test_large_calls(large_calls, dtype, rows):
    testing.check(*both(), inputs(rows, width=97, hidden=70, features=49), dtype=dtype, every_subset=True)


@pytest.mark.parametrize(("has_b1", "has_b2"), [(False, False), (True, False), (False, True)])
def test_without_biases(has_b1, has_b2):
    x, w1, b1, w2, b2 = inputs(2, 3)
    values = (x, w1, b1 if has_b1 else None, w2, b2 if has_b2 else None)
    testing.check(*both(), values, dtype=torch.float32)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width", "hidden", "features"), [(9, 33, 65, 17), (200, 97, 70, 49)])
def test_float32_parameters_beside_bfloat16(activation, rows, width, hidden, features):
    x, *parameters = inputs(rows, width=width, hidden=hidden, features=features)
    leaves = [x.bfloat16().requires_grad_(), *(p.float().requires_grad_() for p in parameters)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = testing.make(rows, features, seed=5).bfloat16()

    def run(function, leaves):
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    ours, plain = both(activation)
    for a, p, exact in zip(run(ours, leaves), run(plain, leaves), run(plain, wide), strict=True):
        assert a.dtype == p.dtype
        testing.assert_within_budget(a, p, exact)


@pytest.mark.backend_independent
def test_activations():
    x, w1, b1, w2, b2 = inputs(4)
    h = x @ w1.t() + b1
    exact = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    torch.testing.assert_close(mlp(x, w1, b1, w2, b2), exact @ w2.t() + b2)
    tanh = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x, w1, b1, w2, b2, activation="gelu_tanh"), tanh @ w2.t() + b2)


@pytest.mark.backend_independent
def test_autocast():
    leaves = [v.float().requires_grad_() for v in inputs(2, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(*leaves)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in leaves)


@pytest.mark.backend_independent
def test_autocast_in_a_compiled_function():
    leaves = [v.float().requires_grad_() for v in inputs(2, 3)]

    def run(*values):
        with torch.autocast("cpu", torch.bfloat16):
            return mlp(*values)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(y, run(*leaves))


@pytest.mark.backend_independent
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradcheck(activation):
    leaves = [v.requires_grad_() for v in inputs(2, 2, width=3, hidden=4, features=2)]
    for function in both(activation):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    x, *rest = (v.float() for v in inputs(4, 3))
    leaves = [v.requires_grad_() for v in (testing.LAYOUTS[layout](x), *rest)]
    torch.library.opcheck(torch.ops.ov3fast.mlp, (*leaves, "gelu", ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    leaves = [v.float().requires_grad_() for v in inputs(2, 3)]
    torch.compile(lambda *v: mlp(*v).square().sum(), fullgraph=True, backend="aot_eager")(*leaves).backward()
    expected = torch.autograd.grad(mlp(*leaves).square().sum(), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least 1 dimension"),
        ({"x": torch.ones(2, 9, dtype=torch.float16)}, TypeError, "use bfloat16"),
        ({"w1": torch.ones(13, 8)}, ValueError, r"w1 must have shape \(13, 9\) \[H, K\], got \(13, 8\)"),
        ({"w1": torch.ones(13, 9).bfloat16()}, TypeError, "w1 must be of dtype float32, got bfloat16"),
        ({"b1": torch.ones(9)}, ValueError, r"b1 must have shape \(13,\)"),
        ({"w2": torch.ones(5, 12)}, ValueError, r"w2 must have shape \(5, 13\) \[D, H\]"),
        ({"w2": torch.ones(5)}, ValueError, "w2 must have 2 dimensions"),
        ({"b2": torch.ones(13)}, ValueError, r"b2 must have shape \(5,\)"),
        ({"activation": "relu"}, ValueError, "activation must be one of gelu, gelu_tanh; got 'relu'"),
        ({"impl": "nonsense"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": torch.ones(2, 9), "w1": torch.ones(13, 9), "b1": None, "w2": torch.ones(5, 13), "b2": None, **change}
    with pytest.raises(error, match=words):
        mlp(**arguments)
