"""The onednn backend of linear, mlp and latent_projection, which is chosen where measurements show it to be faster."""

import functools
import importlib

import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops import _dispatch, onednn
from ov3fast.ops._patches import from_patches, moved_from_patches, moved_to_patches, to_patches

pytestmark = [
    pytest.mark.backend_independent,
    pytest.mark.skipif(onednn.unavailable_reason() is not None, reason=str(onednn.unavailable_reason())),
]

make = testing.make
CALLS = {
    "linear": ({}, (make(50, 33), make(49, 33, seed=1), make(49, seed=2))),
    "linear, one row": ({}, (make(33), make(49, 33, seed=1), make(49, seed=2))),
    "mlp": (
        {"activation": "gelu"}, (make(50, 33), make(49, 33, seed=1), make(49, seed=2), make(20, 49, seed=3), make(20, seed=4)),
    ),
    "mlp, tanh": (
        {"activation": "gelu_tanh"}, (make(2, 5, 33), make(49, 33, seed=1), make(49, seed=2), make(20, 49, seed=3), make(20, seed=4)),
    ),
    "latent_projection": ({"grid": (2, 3)}, (make(2, 6, 24), make(16, 24, seed=1), make(16, seed=2))),
    "latent_projection, wide": ({"grid": (1, 6), "patch_size": 4}, (make(2, 6, 24), make(32, 24, seed=1), make(32, seed=2))),
}  # fmt: skip


def pair(name):
    (options, values), op = CALLS[name], name.split(",")[0]
    reference = importlib.import_module(f"ov3fast.ops.{op}").reference
    return functools.partial(getattr(ops, op), impl="onednn", **options), functools.partial(reference, **options), values


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request):
    if request.param == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    return request.param


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_parity(name, dtype, layout):
    testing.check(*pair(name), dtype=dtype, layout=testing.LAYOUTS[layout], every_subset=True)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("mlp")])
def test_the_fused_activation_of_inference(name, dtype):
    ours, plain, values = pair(name)
    narrow = [value.to(dtype) for value in values]
    got, theirs, exact = ours(*narrow), plain(*narrow), plain(*(value.double() for value in narrow))
    testing.assert_within_budget(got, theirs, exact)
    testing.assert_within_budget(got, ours(narrow[0].clone().requires_grad_(), *narrow[1:]).detach(), exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad):
    for name in ("linear", "mlp"):
        ours, plain, values = pair(name)
        values = [value.float() for value in values]
        values[0][3, 4] = bad
        assert torch.equal(ours(*values).isfinite(), plain(*values).isfinite())


def test_float32_parameters_beside_bfloat16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    for name in ("linear", "mlp"):
        ours, plain, values = pair(name)
        x, *parameters = (value.float().requires_grad_() for value in values)
        x = x.detach().bfloat16()
        got, theirs = ours(x, *parameters), plain(x, *parameters)
        testing.assert_within_budget(got, theirs, plain(x.double(), *(p.double() for p in parameters)))
        assert {g.dtype for g in torch.autograd.grad(got.sum(), parameters)} == {torch.float32}


def test_what_it_leaves_to_others():
    x, weight, bias = CALLS["linear"][1]
    with pytest.raises(RuntimeError, match="linear: impl='onednn' can't run this call: it does not take torch.float64"):
        ops.linear(x, weight, bias, impl="onednn")
    assert ops.linear(x[:0].float(), weight.float(), impl="onednn").shape == (0, 49)


def test_it_is_never_the_first_choice():
    """Without measurements others take precedence: on Intel chips MKL is faster."""
    assert _dispatch.PREFERENCE[-1] == "onednn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_move_whole(dtype, patch_size):
    picture = make(2, 3, 2 * patch_size, 3 * patch_size).to(dtype)
    patches = to_patches(picture, patch_size)
    assert torch.equal(moved_to_patches(picture, patch_size), patches)
    assert torch.equal(moved_from_patches(patches, patch_size, (2, 3)), from_patches(patches, patch_size, (2, 3)))
