import importlib

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from ov3fast import ops, testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.linear_cross_entropy import linear_cross_entropy, reference

module = importlib.import_module("ov3fast.ops.linear_cross_entropy")
SIZES = [(7, 72, 33), (1, 1, 1), (0, 8, 5), (17, 5, 65)]


def inputs(tokens, width, classes, ignored=True):
    labels = torch.arange(tokens) * 5 % classes
    if ignored:
        labels[1::3] = -100
    return testing.make(tokens, width), testing.make(classes, width, seed=1), labels


def pair(labels, **how):
    def ours(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, **how)

    def plain(hidden, weight):
        return reference(hidden, weight, labels, **how)

    return ours, plain


@pytest.fixture
def small_chunks(monkeypatch, request):
    """Two rows at a time for 33 classes."""
    monkeypatch.setattr(importlib.import_module("ov3fast.ops._cross_entropy_eager"), "CHUNK_LOGITS", 66)
    if triton.INTERPRETED:
        request.getfixturevalue("large_calls")
        monkeypatch.setattr(importlib.import_module("ov3fast.kernels.linear_cross_entropy"), "CHUNK_BYTES", 66 * 4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_parity(size, dtype, reduction):
    for ignored in (False, True):
        hidden, weight, labels = inputs(*size, ignored)
        testing.check(*pair(labels, reduction=reduction), (hidden, weight), dtype=dtype, every_subset=True)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_layouts(small_chunks, dtype, layout):
    hidden, weight, labels = inputs(7, 24, 33)
    arrange = testing.LAYOUTS[layout]
    for reduction in ("none", "mean"):
        testing.check(
            *pair(arrange(labels), reduction=reduction), (hidden, weight), dtype=dtype, layout=arrange, every_subset=True
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not triton.INTERPRETED, reason="what test_parity has of large calls on other backends")
def test_large_calls(large_calls, dtype, reduction):
    hidden, weight, labels = inputs(7, 72, 33)
    testing.check(*pair(labels, reduction=reduction), (hidden, weight), dtype=dtype, every_subset=True)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_ignored_is_no_matter(reduction, chunked, implementation, request):
    if implementation == "reference":
        pytest.skip("PyTorch's own losses multiply it by 0")
    if chunked:
        request.getfixturevalue("small_chunks")
    hidden, weight, labels = inputs(7, 24, 33)
    ours, plain = pair(labels, reduction=reduction)
    results = []
    for function, ignored in ((plain, 0.0), (ours, torch.nan)):
        values = torch.where((labels == -100)[:, None], ignored, hidden), weight
        leaves = [value.float().requires_grad_() for value in values]
        with torch.no_grad():
            results.append([function(*leaves)])
        loss = function(*leaves)
        results[-1] += [loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("chunked", [False, True])
def test_batch_axes(chunked, request, monkeypatch):
    if chunked:
        request.getfixturevalue("small_chunks")
    labels = torch.tensor([[0, 3, -100], [1, 2, 4]])
    values = testing.make(2, 3, 8), testing.make(5, 8, seed=1)
    for reduction in ("mean", "none"):
        for layout in testing.LAYOUTS.values():
            testing.check(
                *pair(layout(labels), reduction=reduction), values, dtype=torch.float32, layout=layout, every_subset=True
            )
    assert linear_cross_entropy(*values, labels, reduction="none").shape == (2, 3)


@pytest.mark.backend_independent
def test_matches_torch():
    hidden, weight, labels = inputs(9, 6, 11)
    labels[4] = 7
    for ignore_index in (-100, 7):
        labels = labels.clamp(min=0) if ignore_index == 7 else labels
        for reduction in ("mean", "sum", "none"):
            expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=ignore_index, reduction=reduction)
            got = linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index, reduction=reduction)
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_counts(dtype, chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    hidden, weight, labels = (v.to(dtype).requires_grad_() if v.is_floating_point() else v for v in inputs(4, 6, 33))
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)) == 0


@pytest.mark.backend_independent
def test_the_host_waits_for_no_gpu():
    """A tensor without values raises for one that is looked at."""
    eager = importlib.import_module("ov3fast.ops._cross_entropy_eager")
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = (torch.empty(size, 8, device="cuda") for size in (4, 5))
        labels = torch.empty(4, device="cuda", dtype=torch.int64)
        for function in (eager.total, eager.differentiable_total(hidden, weight)):
            loss, *_ = function(hidden, weight, labels, -100, True, False, False)
            assert loss.shape == () and loss.dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_confident_rows_keep_their_digits(scale):
    """Logits up to about 1000, and rows whose label has nearly all the probability."""
    hidden = scale * torch.eye(8, dtype=torch.float64) + 0.01 * testing.make(8, 8)
    weight = scale * torch.eye(8, dtype=torch.float64) + 0.01 * testing.make(8, 8, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        testing.check(*pair(torch.arange(8), reduction="none"), (hidden, weight), dtype=dtype)


@pytest.mark.backend_independent
def test_gradcheck(small_chunks):
    hidden, weight, labels = inputs(4, 3, 33)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    for function in (*pair(labels), *pair(labels, reduction="none")):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    hidden, weight, labels = inputs(4, 8, 5)
    hidden, weight = (testing.LAYOUTS[layout](v.float()).requires_grad_() for v in (hidden, weight))
    torch.library.opcheck(torch.ops.ov3fast.linear_cross_entropy, (hidden, weight, labels, -100, ""))
    total = (hidden, weight, labels, -100, True, True, True, "")
    torch.library.opcheck(torch.ops.ov3fast.linear_cross_entropy_total, total)
    total = (hidden.unflatten(0, (2, 2)), weight, labels.view(2, 2), -100, True, True, True, "")
    torch.library.opcheck(torch.ops.ov3fast.linear_cross_entropy_total, total)


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    hidden, weight, labels = inputs(6, 8, 5)
    leaves = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    ours, _ = pair(labels)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(ours, fullgraph=True, backend=backend)(*leaves)
    assert sum("ov3fast" in str(node.target) for node in graphs[0].graph.nodes) == 1
    got = torch.autograd.grad(torch.compile(ours, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(ours(*leaves), leaves))


@pytest.mark.backend_independent
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.skipif(triton.INTERPRETED, reason="one contract for all backends, and each row is a program")
def test_saved_bytes_are_linear(reduction):
    def saved(tokens, classes):
        hidden, weight = torch.ones(tokens, 4, requires_grad=True), torch.ones(classes, 4, requires_grad=True)
        labels = torch.zeros(tokens, dtype=torch.int64)
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        return sum(kept.values())

    # The gradients by hidden and weight; or hidden, labels, lse and weight.
    assert saved(64, 100) == 64 * (4 * 4 + (0 if reduction == "sum" else 8 + 8)) + 100 * 4 * 4
    assert saved(640, 1000) == 10 * saved(64, 100)


@pytest.mark.backend_independent
def test_autocast():
    hidden, weight, labels = inputs(5, 16, 9)
    plain = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.float(), weight.float(), labels)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": "h"}, TypeError, "linear_cross_entropy: hidden must be a tensor, got str"),
        ({"hidden": torch.ones(8)}, ValueError, r"hidden must have shape \[...,D\] with at least 2 dimensions, got \(8,\)"),
        ({"weight": torch.ones(5, 7)}, ValueError, r"weight must have shape \(5, 8\) \[V,D\], got \(5, 7\)"),
        ({"weight": torch.ones(5, 8).double()}, TypeError, "weight must be of dtype float32, got float64"),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be of dtype int64, got float32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels must have shape \(3,\) like hidden"),
        ({"labels": torch.tensor([0, 5, 1])}, ValueError, r"labels must lie in \[0, 5\) or be ignore_index=-100, got 5"),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, r"labels must lie in \[0, 5\) or be ignore_index=-100, got -1"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none; got 'max'"),
        ({"impl": "liger"}, ValueError, "impl must be one of triton, cpu, eager; got 'liger'"),
    ],
)
def test_errors(change, error, words):
    arguments = {"hidden": torch.ones(3, 8), "weight": torch.ones(5, 8), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=words):
        ops.linear_cross_entropy(**{**arguments, **change})


# Errors that only the compiled kernels can make: tile edges, several chunks, threads.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(529, 49, 191), (1200, 7, 50), (49, 193, 385), (9, 65, 600)])
def test_edges_of_tiles(size, dtype, reduction):
    if triton.INTERPRETED:
        size = (size[0] // 12 + 5, *size[1:-1], size[-1] * 13)  # each row is a program, and blocks are long
    for ignored in (False, True):
        hidden, weight, labels = inputs(*size, ignored)
        testing.check(*pair(labels, reduction=reduction), (hidden, weight), dtype=dtype)


@pytest.mark.skipif(triton.INTERPRETED, reason="too many rows for the interpreter")
def test_many_chunks_lose_no_digits():
    """The weight gradient is accumulated across chunks in more than bfloat16 precision."""
    hidden, weight, labels = inputs(40 * 528, 7, 50)
    testing.check(*pair(labels), (hidden, weight), dtype=torch.bfloat16)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    tokens=st.sampled_from([7, 8, 9, 47, 48, 49, 97]),
    width=st.sampled_from([3, 16, 49]),
    classes=st.sampled_from([1, 2, 9, 48, 193]),
    reduction=st.sampled_from(module.REDUCTIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(sorted(testing.LAYOUTS)),
)
def test_any_shape(tokens, width, classes, reduction, dtype, layout):
    hidden, weight, labels = inputs(tokens, width, classes)
    arrange = testing.LAYOUTS[layout]
    testing.check(*pair(arrange(labels), reduction=reduction), (hidden, weight), dtype=dtype, layout=arrange)


def test_threads_change_no_bit(implementation):
    if implementation == "reference":
        pytest.skip("PyTorch's own products")
    if implementation == "triton":
        pytest.skip("the CPU's threads")
    hidden, weight, labels = inputs(600, 49, 391)
    for dtype in (torch.float32, torch.bfloat16):
        for reduction in ("mean", "none"):

            def run(dtype=dtype, reduction=reduction):
                leaves = [v.to(dtype).requires_grad_() for v in (hidden, weight)]
                loss = pair(labels, reduction=reduction)[0](*leaves)
                return [loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss))]

            testing.assert_same_bits_on_threads(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_gradients(dtype):
    """Means and sums in inference are those of training."""
    for size in SIZES:
        hidden, weight, labels = inputs(*size)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        for reduction in ("mean", "sum"):
            ours, plain = pair(labels, reduction=reduction)
            budget = testing.Budget(lambda values, plain=plain: [plain(*values)], (hidden, weight))
            budget.check([ours(hidden, weight)])


def test_backward_twice():
    """The gradients computed in the forward are scaled again each time and don't alias earlier results."""
    hidden, weight, labels = inputs(6, 8, 5)
    leaves = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    loss = linear_cross_entropy(*leaves, labels)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    for leaf, grad in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_not_finite(reduction, value):
    hidden, weight, labels = inputs(9, 5, 7, ignored=False)
    hidden, weight = hidden.float(), weight.float()
    hidden[3, 2] = value
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    for function in pair(labels, reduction=reduction):
        loss = function(*leaves)
        grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
        assert loss.isnan().sum() == 1 and grads[0][3].isnan().all() and grads[1].isnan().all()
        assert grads[0][torch.arange(9) != 3].isfinite().all()


def test_backend(implementation):
    if implementation == "reference":
        pytest.skip("chosen by name")
    ours = "triton" if implementation == "triton" else "cpu"
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype, name in ((torch.float32, ours), (torch.bfloat16, ours), (torch.float64, "eager")):
        x = torch.ones(2, 3, dtype=dtype)
        assert _dispatch.chosen("linear_cross_entropy", "", x, x, labels, -100) == name
        assert _dispatch.chosen("linear_cross_entropy_total", "", x, x, labels, -100, True, True, True) == name
