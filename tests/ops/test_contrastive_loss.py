import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.contrastive_loss import contrastive_loss, reference

module = importlib.import_module("ov3fast.ops.contrastive_loss")
KINDS = ["softmax", "sigmoid"]


def inputs(pairs, width, kind="softmax", scale=10.0):
    scalars = [torch.tensor(scale, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)]
    features = testing.make(pairs, width, scale=2.0), testing.make(pairs, width, seed=1, scale=0.5)
    return *features, *scalars[: 1 if kind == "softmax" else 2]


def pair(kind):
    def ours(image, text, scale, bias=None):
        return contrastive_loss(image, text, scale, kind=kind, logit_bias=bias)

    def plain(image, text, scale, bias=None):
        return reference(image, text, scale, kind=kind, logit_bias=bias)

    return ours, plain


@pytest.fixture
def small_chunks(monkeypatch):
    """Two rows at a time for 7 columns."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 14)
    if triton.INTERPRETED:
        monkeypatch.setattr(importlib.import_module("ov3fast.kernels.contrastive.launch"), "CHUNK_PAIRS", 14)
        monkeypatch.setattr(triton, "is_few", lambda *_: False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(7, 72), (1, 1), (1, 5), (0, 4), (33, 16)])
def test_parity(size, dtype, kind):
    testing.check(*pair(kind), inputs(*size, kind), dtype=dtype, keep=(2, 3), every_subset=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("size", [(7, 24), (65, 8)])
def test_chunks_and_layouts(small_chunks, size, layout, kind):
    for dtype in (torch.float32, torch.bfloat16):
        testing.check(*pair(kind), inputs(*size, kind), dtype=dtype, layout=testing.LAYOUTS[layout], keep=(2, 3))


@pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 5), (0, 4), (33, 16)])
def test_large_calls(large_calls, size, dtype, kind):
    """As if of many pairs."""
    testing.check(*pair(kind), inputs(*size, kind), dtype=dtype, keep=(2, 3), every_subset=True)


@pytest.mark.backend_independent
@pytest.mark.parametrize("kind", KINDS)
def test_scalars_are_differentiated(small_chunks, kind):
    """Each subset of all four arguments, scalars too."""
    testing.check(*pair(kind), inputs(7, 24, kind), dtype=torch.float64, every_subset=True)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("aligned", [1.0, -1.0])
def test_any_scale_and_low_row_maxima(scale, aligned):
    """A fixed shift by the scale underflows at scale 100 if all cosines of a row are near -1; a running maximum does not."""
    image, text, _ = inputs(17, 8)
    text = aligned * (image.sign() * 4 + 0.1 * text)  # cosines near +1 or -1
    image = image.sign() * 4 + 0.1 * image
    values = (image, text, torch.tensor(scale, dtype=torch.float64))
    for kind in KINDS:
        testing.check(*pair(kind), values, dtype=torch.float32)


def test_converged_gradients_keep_their_digits():
    """Nearly perfect predictions: p_ii is 1 - 1e-5, which bfloat16 would round to 1 before the one-hot is subtracted."""
    image = torch.eye(8, dtype=torch.float64) + 0.01 * testing.make(8, 8)
    values = (image, image.flip(0).flip(0) + 0.01 * testing.make(8, 8, seed=3), torch.tensor(12.0, dtype=torch.float64))
    testing.check(*pair("softmax"), values, dtype=torch.bfloat16, keep=(2,))


@pytest.mark.backend_independent
def test_zero_features_follow_the_clamp():
    image, text, scale = inputs(4, 3)
    image[1] = 0
    testing.check(*pair("softmax"), (image, text, scale), dtype=torch.float64)


@pytest.mark.backend_independent
def test_known_values():
    """One pair: 0; orthogonal pairs: log(1 + (N - 1) e^-s)."""
    scale = torch.tensor(3.0)
    assert contrastive_loss(torch.ones(1, 4), -torch.ones(1, 4), scale).item() == 0.0
    expected = torch.log(1 + 4 * torch.exp(-scale))
    torch.testing.assert_close(contrastive_loss(torch.eye(5), 7 * torch.eye(5), scale), expected)
    signed = contrastive_loss(torch.ones(1, 4), torch.ones(1, 4), scale, kind="sigmoid", logit_bias=torch.tensor(1.0))
    torch.testing.assert_close(signed, torch.log1p(torch.exp(torch.tensor(-4.0))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(3, 7, 24), (1, 5, 8), (2, 0, 4)])
def test_views(size, kind):
    views, pairs, width = size
    _, text, *scalars = inputs(pairs, width, kind)
    image = testing.make(views, pairs, width, scale=2.0)
    for dtype in (torch.float32, torch.bfloat16):
        testing.check(*pair(kind), (image, text, *scalars), dtype=dtype, keep=(2, 3), every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_views_have_the_bits_of_calls_of_their_own(kind, dtype):
    _, text, *scalars = inputs(9, 16, kind)
    leaves = [testing.make(2, 9, 16).to(dtype), text.to(dtype), *(s.float() for s in scalars)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ours, _ = pair(kind)
    image, *others = leaves
    apart = torch.stack([ours(view, *others) for view in image]).mean()
    together = ours(*leaves)
    testing.assert_same_bits([together], [apart])
    testing.assert_same_bits(torch.autograd.grad(together, leaves), torch.autograd.grad(apart, leaves))


@pytest.mark.backend_independent
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(small_chunks, kind):
    leaves = [value.requires_grad_() for value in inputs(5, 3, kind, scale=2.0)]
    leaves_of_views = [testing.make(2, 5, 3).requires_grad_(), *leaves[1:]]
    for function in pair(kind):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradcheck(function, leaves_of_views)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    for kind in KINDS:
        image, text, *scalars = (v.float() for v in inputs(4, 8, kind))
        image, text = (testing.LAYOUTS[layout](t).requires_grad_() for t in (image, text))
        scale, bias = [s.requires_grad_() for s in scalars] + [None] * (2 - len(scalars))
        torch.library.opcheck(torch.ops.ov3fast.contrastive_loss, (image, text, scale, bias, kind, "", "gather", ""))
        views = testing.LAYOUTS[layout](torch.stack([image.detach(), text.detach()])).requires_grad_()
        torch.library.opcheck(torch.ops.ov3fast.contrastive_loss, (views, text, scale, bias, kind, "", "gather", ""))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    image, text, scale = (v.float().requires_grad_() for v in inputs(6, 8))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(contrastive_loss, fullgraph=True, backend=backend)(image, text, scale)
    assert sum("ov3fast" in str(node.target) for node in graphs[0].graph.nodes) == 1
    torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")(image, text, scale).backward()
    got = image.grad.clone()
    image.grad = None
    contrastive_loss(image, text, scale).backward()
    torch.testing.assert_close(got, image.grad)


@pytest.mark.backend_independent
@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes_are_linear(kind):
    def saved(pairs):
        image, text = (torch.ones(pairs, 4, requires_grad=True) for _ in range(2))
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            contrastive_loss(image, text, torch.tensor(1.0, requires_grad=True), kind=kind)
        return sum(kept.values())

    per_pair = 4 * (2 * 4 + (4 if kind == "softmax" else 0))
    assert saved(64) - saved(32) == 32 * per_pair
    assert saved(640) - saved(64) == 576 * per_pair


@pytest.mark.backend_independent
def test_autocast_narrows_the_features():
    image, text, scale = (v.float() for v in inputs(9, 16))
    narrow = contrastive_loss(image.bfloat16(), text.bfloat16(), scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, scale), narrow)
    assert narrow.dtype == torch.float32


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"image": 3}, TypeError, "contrastive_loss: image must be a tensor, got int"),
        ({"text": None}, TypeError, "text must be a tensor, got NoneType"),
        ({"text": torch.ones(4, 8)}, ValueError, r"text must have shape \(5, 8\) like image, got \(4, 8\)"),
        ({"text": torch.ones(5, 8).double()}, TypeError, "text must be of dtype float32, got float64"),
        ({"logit_scale": 10.0}, TypeError, "logit_scale must be a tensor, got float"),
        ({"logit_scale": torch.ones(5)}, ValueError, r"logit_scale must be a scalar tensor, got shape \(5,\)"),
        ({"kind": "clip"}, ValueError, "kind must be one of softmax, sigmoid; got 'clip'"),
        ({"logit_bias": torch.tensor(1.0)}, ValueError, "logit_bias is for kind='sigmoid'"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed process group or None, got str"),
        ({"impl": "cudnn"}, ValueError, "impl must be one of triton, cpu, eager; got 'cudnn'"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        ops.contrastive_loss(
            **{"image": torch.ones(5, 8), "text": torch.ones(5, 8), "logit_scale": torch.tensor(1.0), **change}
        )


# Errors that only the compiled kernels can make: tile edges, rounded gradients, threads.

EDGES = [1, 7, 8, 9, 47, 48, 49, 63, 64, 65, 193]


@pytest.fixture
def rounded_gradients(monkeypatch):
    """Gradients with respect to logits in the features' dtype, even with few columns."""
    file = "ov3fast.kernels.contrastive.launch" if triton.INTERPRETED else "ov3fast.ops.contrastive_loss"
    monkeypatch.setattr(importlib.import_module(file), "FEW", 0)
    monkeypatch.setattr(triton, "is_few", lambda *_: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pairs", "width"), [(193, 49), (49, 193)] if triton.INTERPRETED else [(193, 49), (391, 7), (49, 193), (577, 3)]
)
def test_edges_of_tiles(rounded_gradients, dtype, pairs, width):
    for kind in KINDS:
        testing.check(*pair(kind), inputs(pairs, width, kind), dtype=dtype, keep=(2, 3))


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    pairs=st.sampled_from(EDGES),
    width=st.sampled_from([1, 3, 8, 17, 48, 65]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
)
def test_any_shape(pairs, width, kind, dtype, layout):
    testing.check(*pair(kind), inputs(pairs, width, kind), dtype=dtype, layout=testing.LAYOUTS[layout], keep=(2, 3))


@pytest.mark.parametrize("spread", [1.0, 0.05, 0.01])
def test_features_that_are_alike(rounded_gradients, spread):
    """Gradients are differences of nearly equal terms, whose rounding errors must not dominate."""
    centres = testing.make(1, 64, seed=5), testing.make(1, 64, seed=6)
    image, text = (centre + spread * testing.make(96, 64, seed=seed) for seed, centre in enumerate(centres))
    scale = torch.tensor(14.0, dtype=torch.float64)
    testing.check(*pair("softmax"), (image, text, scale), dtype=torch.bfloat16, keep=(2,))


@pytest.mark.skipif(not triton.INTERPRETED, reason="the Triton kernels have schedules")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["chunked", "cublas"])
def test_schedules(rounded_gradients, monkeypatch, schedule, kind):
    kernels = importlib.import_module("ov3fast.kernels.contrastive.launch")
    monkeypatch.setattr(kernels, "schedule", lambda *_: schedule)
    monkeypatch.setattr(kernels, "CHUNK_PAIRS", 128 * 201)
    for dtype in (torch.float32, torch.bfloat16):
        testing.check(*pair(kind), inputs(201, 68, kind), dtype=dtype, layout=testing.poisoned, keep=(2, 3))


@pytest.mark.parametrize(
    ("opposite", "scale"), [("none", 14.0), ("none", 100.0), ("image", 64.0), ("image", 100.0), ("text", 100.0)]
)
def test_logits_far_below_the_largest(rounded_gradients, scale, opposite):
    """One image or text that is unlike all others, including its positive: all its logits are near -scale."""
    image, text, _ = inputs(70, 24, "softmax")
    centre = testing.make(1, 24, seed=5)
    image, text = centre + 0.1 * image, centre + 0.4 * text
    if opposite != "none":
        (image if opposite == "image" else text)[3] = -centre
    values = image, text, torch.tensor(scale, dtype=torch.float64)
    testing.check(*pair("softmax"), values, dtype=torch.bfloat16, keep=(2,))
    testing.check(*pair("softmax"), values, dtype=torch.float32)


def test_threads_change_no_bit(rounded_gradients, implementation):
    if implementation == "reference":
        pytest.skip("PyTorch's own products")
    if implementation == "triton":
        pytest.skip("the CPU's threads")
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:

            def run(dtype=dtype, kind=kind):
                leaves = [v.to(dtype if v.ndim else torch.float32).requires_grad_() for v in inputs(450, 65, kind)]
                loss = pair(kind)[0](*leaves)
                return [loss, *torch.autograd.grad(loss, leaves)]

            testing.assert_same_bits_on_threads(run)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite(kind, value):
    image, text, *scalars = (v.float() for v in inputs(9, 5, kind))
    image[3, 2] = value
    leaves = [image.requires_grad_(), text.requires_grad_()]
    for function in pair(kind):
        loss = function(*leaves, *scalars)
        grads = torch.autograd.grad(loss, leaves)
        assert loss.isnan() and grads[0][3].isnan().all() and grads[1].isnan().all()


def test_backend(implementation):
    if implementation == "reference":
        pytest.skip("chosen by name")
    ours = "triton" if implementation == "triton" else "cpu"
    for dtype, name in ((torch.float32, ours), (torch.bfloat16, ours), (torch.float64, "eager")):
        x = torch.ones(2, 3, dtype=dtype)
        assert _dispatch.chosen("contrastive_loss", "", x, x, torch.tensor(1.0), None, "softmax", "", "gather") == name
