import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.group_norm_silu import group_norm_silu, reference


def channels_last(x):
    """Converts 4D and 5D tensors to channels last; other tensors are unchanged."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if x.ndim in formats else x


LAYOUTS = {**testing.LAYOUTS, "channels_last": channels_last}


def inputs(*shape: int):
    """x, weight, bias."""
    return testing.make(*shape), testing.make(shape[1], seed=1), testing.make(shape[1], seed=2)


def both(groups, eps=1e-6):
    return lambda x, w, b: group_norm_silu(x, groups, w, b, eps), lambda x, w, b: reference(x, groups, w, b, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 12, 5, 7), 3),
        ((1, 1, 1, 1), 1),
        ((2, 6, 1, 1), 2),
        ((0, 4, 3, 3), 2),
        ((2, 4, 0, 3), 2),
        ((3, 9, 17), 9),
        ((3, 8), 2),
        ((2, 4, 3, 2, 3), 1),
    ],
)
def test_parity(dtype, layout, shape, groups):
    testing.check(*both(groups), inputs(*shape), dtype=dtype, layout=LAYOUTS[layout], every_subset=len(shape) == 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_far_from_zero(layout):
    x, weight, bias = inputs(2, 8, 40, 40)
    testing.check(*both(2), (x + 30, weight, bias), dtype=torch.float32, layout=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 128, 17, 33), 32), ((1, 1536, 3, 3), 16), ((3, 66, 40, 1), 2)]
    + ([((1, 12, 61, 53), 2)] if triton.INTERPRETED else [((1, 24, 97, 91), 2), ((2, 9, 149, 67), 3)]),
)
def test_sizes_of_several_strips(dtype, layout, shape, groups):
    testing.check(*both(groups), inputs(*shape), dtype=dtype, layout=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 128, 17, 13) if triton.INTERPRETED else (1, 128, 60, 60), (9, 20, 11, 7)])
def test_threads_do_not_change_bits(dtype, layout, shape):
    x, *rest = (v.to(dtype) for v in inputs(*shape))
    leaves = [v.requires_grad_() for v in (LAYOUTS[layout](x), *rest)]

    def run():
        y = group_norm_silu(leaves[0], 4, *leaves[1:])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    testing.assert_same_bits_on_threads(run, (1, 2))


def strided(x, layout, slices):
    """x in the layout, as a slice (along the given axes) of a larger tensor that is NaN elsewhere."""
    room = [size + 2 * cut for size, cut in zip(x.shape, slices, strict=True)]
    place = tuple(slice(cut, cut + size) for size, cut in zip(x.shape, slices, strict=True))
    whole = LAYOUTS[layout](torch.full(room, torch.nan, dtype=x.dtype))
    whole[place] = x
    return whole[place]


@settings(max_examples=8 if triton.INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 5),
    per_group=st.integers(1, 7),
    height=st.integers(1, 20),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed"]),
    slices=st.tuples(*[st.integers(0, 1)] * 4),
)
def test_any_shape_and_strides(batch, groups, per_group, height, width, dtype, layout, slices):
    testing.check(
        *both(groups), inputs(batch, groups * per_group, height, width), dtype=dtype,
        layout=lambda x: strided(x, layout, slices) if x.ndim == 4 else x,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(dtype, layout, value):
    """A non-finite value in x affects only its group; in weight or bias, its channel; as in PyTorch."""
    x, weight, bias = (v.to(dtype) for v in inputs(2, 6, 5, 9))
    x[0, 1, 2, 3], weight[2], bias[4] = value, value, value
    leaves = [v.requires_grad_() for v in (LAYOUTS[layout](x), weight, bias)]
    results = []
    for function in (group_norm_silu, reference):
        y = function(leaves[0], 3, *leaves[1:])
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


def test_backend(implementation):
    x, weight, bias = (v.float() for v in inputs(2, 4, 3, 3))
    expected = {"reference": "eager", "triton": "triton"}.get(implementation, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        word = _dispatch.request("group_norm_silu", None)
        assert _dispatch.chosen("group_norm_silu", word, x.to(dtype), 2, weight, bias, 1e-6) == expected
    assert _dispatch.chosen("group_norm_silu", "", x.double(), 2, weight.double(), bias.double(), 1e-6) == "eager"


def test_eps():
    testing.check(*both(2, eps=0.5), inputs(2, 4, 3, 3), dtype=torch.float32)


@pytest.mark.backend_independent
def test_is_group_norm_then_silu():
    x, weight, bias = inputs(2, 6, 4, 3)
    groups = x.view(2, 2, -1)
    n = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    n = n.view_as(x) * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(group_norm_silu(x, 2, weight, bias), n / (1 + torch.exp(-n)))


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (2, 4, 3, 2, 5)])
def test_memory_format_is_kept(shape):
    x, weight, bias = (v.float() for v in inputs(*shape))
    for layout in (torch.Tensor.contiguous, channels_last):
        leaf = layout(x).requires_grad_()
        y = group_norm_silu(leaf, 2, weight, bias)
        (grad,) = torch.autograd.grad(y, leaf, torch.ones(shape))
        assert y.stride() == leaf.stride() and grad.stride() == leaf.stride()


def test_float32_parameters_with_bfloat16_input():
    x, weight, bias = inputs(2, 8, 6, 6)
    x, weight, bias = x.bfloat16(), weight.float(), bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = group_norm_silu(x, 4, weight, bias)
    exact = reference(x.double(), 4, weight.double(), bias.double())
    assert y.dtype == torch.bfloat16
    testing.assert_within_budget(y, exact.bfloat16(), exact)


@pytest.mark.backend_independent
def test_gradcheck():
    leaves = [v.requires_grad_() for v in inputs(2, 4, 2, 3)]
    for function in both(2):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "channels_last"])
def test_opcheck(layout):
    x, *rest = (v.float() for v in inputs(4, 6, 3, 2))
    x, weight, bias = (v.requires_grad_() for v in (LAYOUTS[layout](x), *rest))
    torch.library.opcheck(torch.ops.ov3fast.group_norm_silu, (x, 2, weight, bias, 1e-6, ""))


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compile_keeps_one_node(layout):
    x, *rest = (v.float() for v in inputs(2, 6, 3, 2))
    leaves = [v.requires_grad_() for v in (LAYOUTS[layout](x), *rest)]
    ours, _ = both(3)
    torch.compile(lambda *v: ours(*v).square().sum(), fullgraph=True, backend="aot_eager")(*leaves).backward()
    expected = torch.autograd.grad(ours(*leaves).square().sum(), leaves)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(6)}, ValueError, r"x must be \[B, C, ...\]"),
        ({"x": torch.ones(2, 6, 3, 3, dtype=torch.int32)}, TypeError, "x must be of dtype"),
        ({"num_groups": 4}, ValueError, "num_groups must divide the 6 channels of x, got 4"),
        ({"num_groups": 0}, ValueError, "num_groups must divide"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(6,\) \[C\], got \(5,\)"),
        ({"weight": torch.ones(6).double()}, TypeError, "weight must be of dtype float32, got float64"),
        ({"bias": torch.ones(6, 1)}, ValueError, "bias must have shape"),
        ({"bias": None}, TypeError, "bias must be a tensor, got NoneType"),
        (
            {"x": torch.ones(2, 6, 3, 3).bfloat16(), "bias": torch.ones(6).bfloat16()},
            TypeError,
            "bias must be of weight's dtype",
        ),
        ({"impl": "nonsense"}, ValueError, "impl must be one of .*cpu, eager; got 'nonsense'"),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": torch.ones(2, 6, 3, 3), "num_groups": 2, "weight": torch.ones(6), "bias": torch.ones(6), **change}
    with pytest.raises(error, match=words):
        group_norm_silu(**arguments)
