import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.patch_embed import patch_embed, reference

RNG = ops.random.make_rng(7, 2**32 - 3)


def inputs(batch=2, channels=3, height=6, width=4, patch=2, features=5, cls=True, moments=False):
    """latents (or moments), weight, bias, pos_embed, cls_token."""
    tokens = (height // patch) * (width // patch)
    return (
        testing.make(batch, channels * (1 + moments), height, width),
        testing.make(features, channels * patch**2, seed=1),
        testing.make(features, seed=2),
        testing.make(tokens + cls, features, seed=3),
        testing.make(features, seed=4) if cls else None,
    )


def both(**options):
    return lambda *a: patch_embed(*a, **options), lambda *a: reference(*a, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(batch=1, channels=1, height=1, width=1, patch=1, features=1),
        dict(batch=3, height=2, patch=1, features=9),
        dict(batch=0),
        dict(height=0),
        dict(channels=2, height=9, width=3, patch=3, features=17, cls=False),
    ],
)
def test_parity(dtype, layout, sizes):
    options = dict(patch_size=sizes.get("patch", 2), scale=0.36, shift=0.12)
    testing.check(*both(**options), inputs(**sizes), dtype=dtype, layout=testing.LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rng", [RNG, None])
@pytest.mark.parametrize("logvar", [0.0, 30.0, -40.0])
def test_moments(dtype, rng, logvar):
    values = inputs(moments=True)
    values[0][0, 3:, 0, 0] += logvar
    options = dict(moments=True, rng=rng, scale=0.5, shift=-0.25)
    testing.check(*both(**options), values, dtype=dtype, layout=testing.poisoned, every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=3, channels=5, height=14, width=14, features=49),
        dict(batch=9, channels=1, height=1, width=1, patch=1, features=97),
        dict(batch=2, channels=13, height=8, width=4, patch=4, features=48),
        dict(batch=1, channels=1, height=2, width=402, features=193),
        dict(batch=23, channels=2, height=20, width=18, features=3),
    ],
)
def test_tile_borders(dtype, sizes):
    options = dict(patch_size=sizes.get("patch", 2), scale=0.36, shift=0.12, moments=True, rng=RNG)
    testing.check(*both(**options), inputs(**sizes, moments=True), dtype=dtype)


@settings(max_examples=8 if triton.INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(
        st.integers(0, 5), st.integers(1, 9), st.integers(0, 6), st.integers(1, 9), st.integers(1, 4), st.integers(1, 60)
    ),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cls=st.booleans(),
    moments=st.booleans(),
    sampled=st.booleans(),
)
def test_any_shape(sizes, layout, dtype, cls, moments, sampled):
    batch, channels, down, across, patch, features = sizes
    values = inputs(batch, channels, down * patch, across * patch, patch, features, cls, moments)
    options = dict(patch_size=patch, scale=0.7, shift=0.2, moments=moments, rng=RNG if moments and sampled else None)
    testing.check(*both(**options), values, dtype=dtype, layout=testing.LAYOUTS[layout])


def results(*values, **options):
    leaves = [v.detach().requires_grad_() for v in values]
    y = patch_embed(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, testing.make(*y.shape, seed=9).to(y))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 5 if triton.INTERPRETED else 40])
def test_threads_do_not_change_the_bits(implementation, dtype, batch):
    if implementation == "reference":
        pytest.skip("PyTorch's own sums depend on threads")
    values = [v.to(dtype) for v in inputs(batch, height=14, width=18, features=50, moments=True)]
    testing.assert_same_bits_on_threads(lambda: results(*values, moments=True, rng=RNG))


def test_the_kernels_are_chosen(implementation):
    kernels = "triton" if implementation == "triton" else "cpu"
    for dtype, name in ((torch.float32, kernels), (torch.bfloat16, kernels), (torch.float64, "eager")):
        arguments = *(v.to(dtype) for v in inputs()), None, 2, 1.0, 0.0, False
        assert implementation == "reference" or _dispatch.chosen("patch_embed", "", *arguments) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_patches(dtype, value):
    values = [v.to(dtype) for v in inputs(cls=False)[:3]]
    values[0][1, 2, 3, 1] = value
    y, grad_latents, *_ = results(*values)
    bad = torch.zeros(2, 6, dtype=torch.bool)
    bad[1, 2] = True
    assert not y[bad].isfinite().any() and y[~bad].isfinite().all() and grad_latents.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_logvar_is_kept(dtype):
    values = [v.to(dtype) for v in inputs(moments=True)[:2]]
    values[0][0, 3, 0, 0] = torch.nan
    y = patch_embed(*values, moments=True, rng=RNG)
    assert y[0, 0].isnan().all() and y[0, 1:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_infinite_gradient_of_the_cls_token_stays_with_it(dtype, value):
    """No other gradient sums over that row, but those of its position embedding and its token."""
    latents, weight, bias, pos_embed, cls_token = (v.to(dtype).requires_grad_() for v in inputs(channels=4, features=24))
    y = patch_embed(latents, weight, bias, pos_embed, cls_token)
    upstream = torch.ones_like(y)
    upstream[1, 0] = value
    grads = torch.autograd.grad(y, (latents, weight, bias, cls_token, pos_embed), upstream)
    assert all(grad.isfinite().all() for grad in grads[:3]) and not grads[3].isfinite().any()
    assert not grads[4][0].isfinite().any() and grads[4][1:].isfinite().all()


def test_optional_arguments():
    latents, weight, bias, pos_embed, cls_token = inputs()
    for rest in ((None, None, None), (bias, None, None), (None, pos_embed[1:], None), (None, None, cls_token)):
        testing.check(*both(), (latents, weight, *rest), dtype=torch.float32)


@pytest.mark.backend_independent
def test_is_a_convolution():
    latents, weight, bias, pos_embed, _ = inputs(cls=False)
    expected = F.conv2d(latents, weight.view(5, 3, 2, 2), bias, stride=2).flatten(2).transpose(1, 2) + pos_embed
    torch.testing.assert_close(patch_embed(latents, weight, bias, pos_embed), expected)
    torch.testing.assert_close(patch_embed(latents, weight.view(5, 3, 2, 2), bias, pos_embed), expected)


def test_conv_weight_gets_its_gradient():
    latents, weight, *_ = inputs()
    weight = weight.view(5, 3, 2, 2).requires_grad_()
    patch_embed(latents, weight).square().sum().backward()
    ours, weight.grad = weight.grad, None
    F.conv2d(latents, weight, stride=2).square().sum().backward()
    torch.testing.assert_close(ours, weight.grad)


def test_sampling_adds_the_stream():
    moments, weight, *_ = inputs(moments=True)
    mean, logvar = moments.chunk(2, dim=1)
    z = mean + (0.5 * logvar).exp() * ops.random.normal(mean.shape, RNG, torch.float64)
    torch.testing.assert_close(patch_embed(moments, weight, moments=True, rng=RNG), patch_embed(z, weight))


def test_float32_latents_with_bfloat16_weights_are_mapped_in_float32():
    latents, weight, *_ = inputs()
    latents, weight = latents.float() * 1e-3 + 7.0, weight.bfloat16()
    y = patch_embed(latents, weight, shift=7.0, scale=1000.0)
    exact = reference(latents.double(), weight.double(), shift=7.0, scale=1000.0)
    assert y.dtype == torch.bfloat16
    testing.assert_within_budget(y, reference(latents, weight, shift=7.0, scale=1000.0), exact)


@pytest.mark.backend_independent
def test_autocast():
    latents, weight, bias, pos_embed, cls_token = (v.float().requires_grad_() for v in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        y = patch_embed(latents, weight, bias, pos_embed, cls_token)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in (latents, weight, bias, pos_embed, cls_token))


@pytest.mark.backend_independent
def test_gradcheck():
    leaves = [v.requires_grad_() for v in inputs(batch=1, height=2, features=3, moments=True)]
    for function in both(moments=True, rng=RNG, scale=0.7, shift=0.1):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    latents, *rest = (v.float() for v in inputs(moments=True))
    leaves = [v.requires_grad_() for v in (testing.LAYOUTS[layout](latents), *rest)]
    torch.library.opcheck(torch.ops.ov3fast.patch_embed, (*leaves, RNG, 2, 0.5, 0.1, True, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    leaves = [v.float().requires_grad_() for v in inputs(moments=True)]
    ours, _ = both(moments=True, rng=RNG)
    torch.compile(lambda *a: ours(*a).square().sum(), fullgraph=True, backend="aot_eager")(*leaves).backward()
    got = [leaf.grad for leaf in leaves]
    expected = torch.autograd.grad(ours(*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, list(expected))


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"latents": torch.ones(3, 6, 4)}, ValueError, "latents must have 4 dimensions"),
        ({"latents": torch.ones(2, 3, 6, 4, dtype=torch.int64)}, TypeError, "latents must be of dtype"),
        ({"latents": torch.ones(2, 3, 5, 4)}, ValueError, "multiples of patch_size 2, got 5 x 4"),
        ({"latents": torch.ones(2, 3, 6, 4).double()}, TypeError, "latents must be of weight's dtype torch.float32 or float32"),
        (
            {"latents": torch.ones(2, 16, 6, 4)},
            ValueError,
            r"weight must have shape \(5, 64\) \[D, C\*p\*p\] for 16 latent channels",
        ),
        ({"weight": torch.ones(5, 3, 3, 3)}, ValueError, r"weight must have shape \(5, 3, 2, 2\)"),
        ({"weight": torch.ones(5)}, ValueError, "weight must be"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"pos_embed": torch.ones(7, 5)}, ValueError, r"pos_embed must have shape \(6, 5\) \[N, D\] without a CLS token"),
        ({"pos_embed": torch.ones(6, 5), "cls_token": torch.ones(5)}, ValueError, r"\(7, 5\) \[1 \+ N, D\] with a CLS token"),
        ({"cls_token": torch.ones(5).double()}, TypeError, "cls_token must be of dtype float32, got float64"),
        ({"rng": RNG}, ValueError, "moments is False"),
        ({"rng": 3, "moments": True, "latents": torch.ones(2, 6, 6, 4)}, TypeError, "rng must be an int64 tensor"),
        ({"moments": True}, ValueError, "an even number of channels, got 3"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        ({"impl": "nonsense"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(change, error, words):
    arguments = {"latents": torch.ones(2, 3, 6, 4), "weight": torch.ones(5, 12), **change}
    with pytest.raises(error, match=words):
        patch_embed(**arguments)
