import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.latent_projection import latent_projection, reference


def inputs(batch=2, grid=(3, 2), width=7, channels=4, patch=2):
    """tokens, weight, bias."""
    rows = channels * patch**2
    return (
        testing.make(batch, grid[0] * grid[1], width),
        testing.make(rows, width, seed=1),
        testing.make(rows, seed=2),
    )


def both(**options):
    options = {"grid": (3, 2), **options}
    return lambda *a: latent_projection(*a, **options), lambda *a: reference(*a, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(batch=1, grid=(1, 1), width=1, channels=1, patch=1),
        dict(batch=3, grid=(5, 2), width=33, channels=3, patch=1),
        dict(batch=1, grid=(1, 7), width=17, channels=5, patch=3),
        dict(batch=0),
        dict(grid=(0, 2)),
    ],
)
def test_parity(dtype, layout, sizes):
    functions = both(grid=sizes.get("grid", (3, 2)), patch_size=sizes.get("patch", 2))
    testing.check(*functions, inputs(**sizes), dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=not sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=3, grid=(7, 7), width=49, channels=5),
        dict(batch=9, grid=(1, 1), width=97, channels=1, patch=1),
        dict(batch=2, grid=(2, 1), width=48, channels=13, patch=4),
        dict(batch=1, grid=(1, 201), width=193, channels=1),
        dict(batch=23, grid=(10, 9), width=3, channels=2),
    ],
)
def test_tile_borders(dtype, sizes):
    testing.check(*both(grid=sizes["grid"], patch_size=sizes.get("patch", 2)), inputs(**sizes), dtype=dtype)


@settings(max_examples=8 if triton.INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(
        st.integers(0, 5), st.integers(0, 6), st.integers(1, 9), st.integers(1, 60), st.integers(1, 9), st.integers(1, 4)
    ),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(sizes, layout, dtype):
    batch, down, across, width, channels, patch = sizes
    values = inputs(batch, (down, across), width, channels, patch)
    functions = both(grid=(down, across), patch_size=patch)
    testing.check(*functions, values, dtype=dtype, layout=testing.LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_behind_the_first_one(dtype):
    values = inputs(batch=3, grid=(3, 3), width=20)

    def behind(tokens):
        return torch.cat([torch.full_like(tokens[:, :1], torch.nan), tokens], dim=1)[:, 1:]

    testing.check(*both(grid=(3, 3)), values, dtype=dtype, layout=lambda v: behind(v) if v.ndim == 3 else v)


def results(*values, grid):
    leaves = [v.detach().requires_grad_() for v in values]
    x = latent_projection(*leaves, grid=grid)
    return [x, *torch.autograd.grad(x, leaves, testing.make(*x.shape, seed=9).to(x))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 5 if triton.INTERPRETED else 40])
def test_threads_do_not_change_the_bits(implementation, dtype, batch):
    if implementation == "reference":
        pytest.skip("PyTorch's own sums depend on threads")
    values = [v.to(dtype) for v in inputs(batch, grid=(7, 9), width=50)]
    testing.assert_same_bits_on_threads(lambda: results(*values, grid=(7, 9)))


def test_the_kernels_are_chosen(implementation):
    kernels = "triton" if implementation == "triton" else "cpu"
    for dtype, name in ((torch.float32, kernels), (torch.bfloat16, kernels), (torch.float64, "eager")):
        arguments = *(v.to(dtype) for v in inputs()), 2, 3, 2
        assert implementation == "reference" or _dispatch.chosen("latent_projection", "", *arguments) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_patches(dtype, value):
    values = [v.to(dtype) for v in inputs()]
    values[0][1, 3, 2] = value
    x, grad_tokens, *_ = results(*values, grid=(3, 2))
    bad = torch.zeros(2, 4, 6, 4, dtype=torch.bool)
    bad[1, :, 2:4, 2:4] = True
    assert not x[bad].isfinite().any() and x[~bad].isfinite().all() and grad_tokens.isfinite().all()


def test_without_bias():
    testing.check(*both(), inputs()[:2], dtype=torch.float32)


@pytest.mark.backend_independent
def test_is_a_transposed_convolution():
    tokens, weight, bias = inputs()
    kernel = weight.t().reshape(7, 4, 2, 2)
    expected = F.conv_transpose2d(tokens.transpose(1, 2).reshape(2, 7, 3, 2), kernel, stride=2)
    torch.testing.assert_close(latent_projection(tokens, weight, grid=(3, 2)), expected)
    values = latent_projection(tokens * 0, weight, bias, grid=(3, 2))
    torch.testing.assert_close(values[1, :, 2:4, 0:2].reshape(-1), bias)


@pytest.mark.backend_independent
def test_inverts_the_layout_of_patch_embed():
    picture, identity = testing.make(2, 4, 6, 4), torch.eye(16, dtype=torch.float64)
    tokens = ops.patch_embed(picture, identity)
    assert torch.equal(latent_projection(tokens, identity, grid=(3, 2)), picture)


def test_output_is_contiguous():
    for patch in (1, 2):
        assert latent_projection(*inputs(patch=patch), patch_size=patch, grid=(3, 2)).is_contiguous()


@pytest.mark.backend_independent
def test_autocast():
    tokens, weight, bias = (v.float().requires_grad_() for v in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        x = latent_projection(tokens, weight, bias, grid=(3, 2))
    assert x.dtype == torch.bfloat16
    x.float().sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in (tokens, weight, bias))


@pytest.mark.backend_independent
def test_gradcheck():
    leaves = [v.requires_grad_() for v in inputs(width=3, channels=1)]
    for function in both():
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    tokens, *rest = (v.float() for v in inputs())
    leaves = [v.requires_grad_() for v in (testing.LAYOUTS[layout](tokens), *rest)]
    torch.library.opcheck(torch.ops.ov3fast.latent_projection, (*leaves, 2, 3, 2, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    leaves = [v.float().requires_grad_() for v in inputs()]
    ours, _ = both()
    torch.compile(lambda *v: ours(*v).square().sum(), fullgraph=True, backend="aot_eager")(*leaves).backward()
    expected = torch.autograd.grad(ours(*leaves).square().sum(), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tokens": torch.ones(6, 7)}, ValueError, "tokens must have 3 dimensions"),
        ({"tokens": torch.ones(2, 6, 7, dtype=torch.int64)}, TypeError, "tokens must be of dtype"),
        ({"grid": (2, 2)}, ValueError, r"grid must be \(h, w\) with h \* w = 6 tokens, got \(2, 2\)"),
        ({"grid": (6,)}, ValueError, "grid must be"),
        ({"weight": torch.ones(15, 7)}, ValueError, r"weight must have a multiple of 2\^2 rows, C\*p\*p, got 15"),
        ({"weight": torch.ones(16, 8)}, ValueError, r"weight must have shape \(16, 7\) \[C\*p\*p, D\]"),
        ({"weight": torch.ones(16, 7).double()}, TypeError, "weight must be of dtype float32, got float64"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(16,\)"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"impl": "nonsense"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(change, error, words):
    arguments = {"tokens": torch.ones(2, 6, 7), "weight": torch.ones(16, 7), "grid": (3, 2), **change}
    with pytest.raises(error, match=words):
        latent_projection(**arguments)
