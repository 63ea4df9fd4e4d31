import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.noise_projection import noise_projection, reference

RNG = ops.random.make_rng(21, 2**32 - 2)


def inputs(*lead: int, width=9, features=5):
    """z, sigma, weight, bias."""
    return (
        testing.make(*lead, width),
        testing.make(lead[0], seed=1).abs(),
        testing.make(features, width, seed=2),
        testing.make(features, seed=3),
    )


def ours(*values):
    return noise_projection(*values, rng=RNG)


def plain(*values):
    return reference(*values, rng=RNG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(
    ("lead", "width", "features"), [((3, 7), 33, 17), ((1, 1), 1, 1), ((0, 4), 8, 3), ((2, 0), 8, 3), ((5,), 7, 2)]
)
def test_parity(dtype, layout, lead, width, features):
    values = inputs(*lead, width=width, features=features)
    testing.check(ours, plain, values, dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=lead == (3, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lead", "width", "features"),
    [((3, 3), 47, 49), ((2, 4, 2), 193, 8), ((6, 40), 66, 97), ((200,), 31, 12), ((2, 1030), 7, 9), ((4, 1), 1030, 8)],
)
def test_tile_borders(dtype, lead, width, features):
    testing.check(ours, plain, inputs(*lead, width=width, features=features), dtype=dtype)


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_large_calls(large_calls, dtype, layout):
    values = inputs(3, 7, width=33, features=17)
    testing.check(ours, plain, values, dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=True)


@settings(max_examples=8 if triton.INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(1, 70), st.integers(0, 60)),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(sizes, layout, dtype):
    batch, tokens, width, features = sizes
    values = inputs(batch, tokens, width=width, features=features)
    testing.check(ours, plain, values, dtype=dtype, layout=testing.LAYOUTS[layout])


def results(*values):
    leaves = [v.detach().requires_grad_() for v in values]
    y = ours(*leaves)
    return [y, *torch.autograd.grad(y, leaves, testing.make(*y.shape, seed=9).to(y))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [7, 90 if triton.INTERPRETED else 900])
def test_threads_do_not_change_the_bits(implementation, dtype, tokens):
    if implementation in ("reference", "triton"):
        pytest.skip("their products are PyTorch's, whose sums depend on threads")
    values = [v.to(dtype) for v in inputs(3, tokens, width=33, features=50)]
    testing.assert_same_bits_on_threads(lambda: results(*values))


def test_the_kernels_are_chosen(implementation):
    kernels = "triton" if implementation == "triton" else "cpu"
    for dtype, name in ((torch.float32, kernels), (torch.bfloat16, kernels), (torch.float64, "eager")):
        arguments = *(v.to(dtype) for v in inputs(2, 3)), RNG
        assert implementation == "reference" or _dispatch.chosen("noise_projection", "", *arguments) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_instance(dtype, value):
    values = [v.to(dtype) for v in inputs(3, 4)]
    values[1][1] = value
    y, _, grad_sigma, *_ = results(*values)
    bad = torch.arange(3) == 1
    assert not y[bad].isfinite().any() and y[~bad].isfinite().all() and grad_sigma.isfinite().all()


def test_without_bias():
    testing.check(ours, plain, inputs(2, 3)[:3], dtype=torch.float32)


def test_adds_the_stream():
    z, sigma, weight, bias = inputs(3, 4)
    noisy = z + sigma[:, None, None] * ops.random.normal(z.shape, RNG, torch.float64)
    torch.testing.assert_close(ours(z, sigma, weight, bias), F.linear(noisy, weight, bias))
    torch.testing.assert_close(ours(z, sigma * 0, weight, bias), F.linear(z, weight, bias))


def test_float32_sigma_with_bfloat16_input():
    z, sigma, weight, bias = inputs(3, 40, width=64)
    z, sigma, weight = z.bfloat16(), sigma.float().requires_grad_(), weight.bfloat16()
    y = ours(z, sigma, weight)
    (grad,) = torch.autograd.grad(y, sigma, torch.ones_like(y))
    wide = sigma.detach().double().requires_grad_()
    exact = plain(z.double(), wide, weight.double())
    (exact_grad,) = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32
    testing.assert_within_budget(y, plain(z, sigma, weight), exact)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-2, atol=2e-2)


@pytest.mark.backend_independent
def test_autocast():
    z, sigma, weight, bias = (v.float().requires_grad_() for v in inputs(2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(z, sigma, weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in (z, sigma, weight, bias))


@pytest.mark.backend_independent
def test_gradcheck():
    leaves = [v.requires_grad_() for v in inputs(2, 3, width=4, features=3)]
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradcheck(plain, leaves)


@pytest.mark.backend_independent
def test_noise_is_not_saved():
    z, *rest = inputs(2, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(z.requires_grad_(), *rest)
    noise = ops.random.normal(z.shape, RNG, z.dtype)
    assert not any(t.shape == z.shape and (torch.equal(t, noise) or not torch.equal(t, z)) for t in saved)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    z, *rest = (v.float().requires_grad_() for v in inputs(4, 3))
    z = testing.LAYOUTS[layout](z.detach()).requires_grad_()
    torch.library.opcheck(torch.ops.ov3fast.noise_projection, (z, *rest, RNG, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    leaves = [v.float().requires_grad_() for v in inputs(2, 3)]
    torch.compile(lambda *v: ours(*v).square().sum(), fullgraph=True, backend="aot_eager")(*leaves).backward()
    expected = torch.autograd.grad(ours(*leaves).square().sum(), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z": torch.ones(9)}, ValueError, "z must be"),
        ({"z": None}, TypeError, "z must be a tensor, got NoneType"),
        ({"sigma": torch.ones(4)}, ValueError, r"sigma must have shape \(2,\) \[B\], one value per instance of z, got \(4,\)"),
        ({"sigma": torch.ones(2, 1)}, ValueError, r"sigma must have shape \(2,\)"),
        ({"sigma": torch.tensor(0.5)}, ValueError, r"sigma must have shape \(2,\) .* got \(\)"),
        ({"sigma": 0.5}, TypeError, "sigma must be a tensor, got float"),
        ({"sigma": torch.ones(2).double()}, TypeError, "sigma must be of dtype float32, got float64"),
        ({"weight": torch.ones(5, 8)}, ValueError, r"weight must have shape \(5, 9\) \[D, K\]"),
        ({"weight": torch.ones(5, 9).bfloat16()}, TypeError, "weight must be of dtype float32, got bfloat16"),
        ({"bias": torch.ones(9)}, ValueError, r"bias must have shape \(5,\)"),
        ({"rng": torch.Generator()}, TypeError, "rng must be an int64 tensor"),
        ({"impl": "nonsense"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(change, error, words):
    arguments = {"z": torch.ones(2, 3, 9), "sigma": torch.ones(2), "weight": torch.ones(5, 9), "rng": RNG, **change}
    with pytest.raises(error, match=words):
        noise_projection(**arguments)
