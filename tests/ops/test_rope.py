import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _dispatch
from ov3fast.ops.rope import angles, reference, rope


def tables(tokens, width, dtype=torch.float64):
    return angles(tokens, width, torch.device("cpu"), dtype)


def inputs(batch, tokens, heads, width, norm=True):
    qkv = testing.make(batch, tokens, 3, heads, width)
    weights = (testing.make(width, seed=1), testing.make(width, seed=2)) if norm else ()
    return (qkv, *tables(tokens, width), *weights)


def check(size, norm, dtype, **options):
    qkv, cos, sin, *weights = inputs(*size, norm)
    if dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    testing.check(rope, reference, (qkv, cos, sin, *weights), dtype=dtype, keep=(1, 2), **options)


SIZES = [(2, 5, 3, 16), (1, 1, 1, 2), (2, 17, 2, 72), (0, 3, 2, 8), (2, 3, 1, 64), (1, 33, 2, 22)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(dtype, norm, size):
    check(size, norm, dtype, every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("layout", [name for name in testing.LAYOUTS if name != "contiguous"])
def test_layouts(dtype, norm, layout):
    check((3, 4, 2, 24), norm, dtype, layout=testing.LAYOUTS[layout])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    half=st.integers(1, 64),
    norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(batch, tokens, heads, half, norm, dtype):
    check((batch, tokens, heads, 2 * half), norm, dtype)


def test_is_a_rotation_by_complex_numbers():
    qkv, cos, sin = inputs(2, 6, 2, 8, norm=False)
    turned = rope(qkv, cos, sin)
    numbers = torch.view_as_complex(qkv.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None, None]
    expected = torch.view_as_real(numbers).flatten(-2)
    torch.testing.assert_close(turned[:, :, :2], expected[:, :, :2])
    assert torch.equal(turned[:, :, 2], qkv[:, :, 2])


def test_the_norm_is_torchs():
    qkv, cos, sin, q_weight, k_weight = inputs(2, 6, 2, 8)
    normal = [torch.nn.functional.rms_norm(qkv[:, :, i], (8,), (q_weight, k_weight)[i], 1e-5) for i in (0, 1)]
    expected = rope(torch.stack([*normal, qkv[:, :, 2]], 2), cos, sin)
    torch.testing.assert_close(rope(qkv, cos, sin, q_weight, k_weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(dtype, implementation):
    if implementation in ("reference", "triton"):
        pytest.skip("PyTorch's sums depend on the number of threads, and a GPU's kernels have none")
    qkv, cos, sin, *weights = inputs(5, 40, 2, 24)
    leaves = [v.to(dtype).requires_grad_() for v in (qkv, *weights)]

    def run():
        y = rope(leaves[0], cos.float(), sin.float(), *leaves[1:])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    testing.assert_same_bits_on_threads(run, (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(dtype, norm, value):
    """Not finite in q, k or v spoils what it spoils in the reference, and v passes as it is."""
    qkv, cos, sin, *weights = inputs(2, 3, 2, 20, norm)
    for part, channel in ((0, 3), (1, 16), (2, 19)):
        qkv[1, 2, part, 1, channel] = value
    arguments = (qkv.to(dtype), cos.float(), sin.float(), *(w.to(dtype) for w in weights))
    y, expected = rope(*arguments), reference(*arguments)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[:, :, 2].nan_to_num(7.0), arguments[0][:, :, 2].nan_to_num(7.0))


def test_backend(implementation):
    qkv, cos, sin, *weights = (v.float() for v in inputs(1, 2, 1, 4))
    expected = {"reference": "eager", "triton": "triton"}.get(implementation, "cpu")
    word = _dispatch.request("rope", None)
    for dtype in (torch.float32, torch.bfloat16):
        assert _dispatch.chosen("rope", word, qkv.to(dtype), cos, sin, None, None, 1e-6) == expected
    assert _dispatch.chosen("rope", "", qkv.double(), cos, sin, None, None, 1e-6) == "eager"


@pytest.mark.backend_independent
def test_gradcheck():
    qkv, cos, sin, *weights = inputs(1, 2, 2, 4)
    for rest in ((), weights):
        leaves = [value.requires_grad_() for value in (qkv, *rest)]
        for function in (rope, reference):
            assert torch.autograd.gradcheck(lambda x, *w, f=function: f(x, cos, sin, *w), leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    qkv, cos, sin, *weights = (v.float() for v in inputs(2, 3, 2, 8))
    qkv = testing.LAYOUTS[layout](qkv).requires_grad_()
    for rest in ((None, None), tuple(w.requires_grad_() for w in weights)):
        torch.library.opcheck(torch.ops.ov3fast.rope, (qkv, cos, sin, *rest, 1e-6, ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node_in_front_of_attention():
    qkv, cos, sin, *weights = (v.float() for v in inputs(1, 4, 2, 8))
    leaves = [v.requires_grad_() for v in (qkv, *weights)]

    def loss(qkv, *weights):
        return ops.flash_attention_qkvpacked(rope(qkv, cos, sin, *weights)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_without_norms_the_graph_keeps_angles_alone(implementation):
    if implementation == "reference":
        pytest.skip("PyTorch's own graph keeps what it likes")
    qkv, cos, sin = (v.float() for v in inputs(1, 4, 2, 8, norm=False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.data_ptr()) or value, lambda value: value):
        rope(qkv.requires_grad_(), cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]


def test_float32_weights_and_angles_with_bfloat16():
    qkv, cos, sin, *weights = inputs(2, 3, 2, 16)
    tables_and_weights = [value.float() for value in (cos, sin, *weights)]
    leaves = [qkv.bfloat16().requires_grad_(), *(w.requires_grad_() for w in tables_and_weights[2:])]
    y = rope(leaves[0], *tables_and_weights[:2], *leaves[1:])
    exact = reference(leaves[0].double(), *(value.detach().double() for value in tables_and_weights))
    testing.assert_within_budget(y, exact.bfloat16(), exact)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkv": [1.0]}, TypeError, "rope: qkv must be a tensor, got list"),
        ({"qkv": torch.ones(2, 3, 8)}, ValueError, "qkv must have 5 dimensions"),
        ({"qkv": torch.ones(1, 3, 2, 1, 8)}, ValueError, r"qkv must be \[B, N, 3, H, P\] with an even P"),
        ({"qkv": torch.ones(1, 3, 3, 1, 7)}, ValueError, "with an even P"),
        ({"cos": torch.ones(3, 8)}, ValueError, r"cos must have shape \(3, 4\) \[N, P / 2\], got \(3, 8\)"),
        ({"sin": torch.ones(3, 4).double()}, TypeError, "sin must be of dtype float32, got float64"),
        ({"sin": None}, TypeError, "sin must be a tensor, got NoneType"),
        ({"cos": torch.ones(3, 4).requires_grad_()}, ValueError, "cos and sin get no gradients; detach them"),
        ({"q_weight": torch.ones(8)}, ValueError, "q_weight and k_weight must both be given, or neither"),
        (
            {"q_weight": torch.ones(8), "k_weight": torch.ones(4)},
            ValueError,
            r"k_weight must have shape \(8,\) \[P\], got \(4,\)",
        ),
    ],
)
def test_errors(change, error, words):
    arguments = {"qkv": torch.ones(1, 3, 3, 1, 8), "cos": torch.ones(3, 4), "sin": torch.zeros(3, 4), **change}
    with pytest.raises(error, match=words):
        ops.rope(**arguments)
