import dataclasses
import math
import sys
import types

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ov3fast import ops, testing
from ov3fast.ops import _attention_peers as peers
from ov3fast.ops import _dispatch, cpu, triton
from ov3fast.ops.flash_attention import flash_attention, flash_attention_qkvpacked, reference

NAMED = [pytest.param(name, marks=pytest.mark.backend_independent) for name in ("reference", "sdpa")]
IMPLS = [*NAMED, None]
KERNELS = "triton" if triton.INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(KERNELS == "cpu" and bool(cpu.unavailable_reason()), reason="the CPU kernels were not built")
# queries, keys, heads, head_dim, causal, prefix_len
CASES = {
    "one": (1, 1, 1, 1, False, 0),
    "square": (17, 17, 2, 32, False, 0),
    "head_dim_72": (33, 33, 2, 72, True, 0),
    "more_keys_causal": (5, 9, 2, 8, True, 0),
    "prefix": (9, 9, 2, 8, True, 4),
    "cross_prefix": (7, 11, 1, 24, True, 9),
    "fewer_keys": (9, 5, 2, 16, False, 0),
}
# Sizes around the edges of the kernels' tiles.
BORDERS = {
    "query_blocks": (193, 48, 1, 64, False, 0),
    "key_blocks": (49, 277, 1, 16, True, 3),
    "both": (129, 257, 1, 48, True, 0),
    "widest_head": (8, 9, 1, 256, False, 0),
    "prefix_within_a_tile": (97, 161, 1, 80, True, 100),
    "blind_tiles": (200, 70, 1, 16, True, 0),
}
BLIND = {"blind_rows": (7, 3, 2, 8, True, 0), "no_keys": (3, 0, 2, 8, False, 0), "no_queries": (0, 3, 2, 8, True, 0)}


def inputs(queries, keys, heads, head_dim, batch=2):
    q = testing.make(batch, queries, heads, head_dim)
    return q, testing.make(batch, keys, heads, head_dim, seed=1), testing.make(batch, keys, heads, head_dim, seed=2)


def pair(causal, prefix_len, impl):
    def ours(q, k, v):
        return flash_attention(q, k, v, causal=causal, prefix_len=prefix_len, impl=impl)

    def plain(q, k, v):
        return reference(q, k, v, causal=causal, prefix_len=prefix_len)

    return ours, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, impl, dtype):
    queries, keys, heads, head_dim, causal, prefix_len = CASES[case]
    ours, plain = pair(causal, prefix_len, impl)
    testing.check(ours, plain, inputs(queries, keys, heads, head_dim), dtype=dtype, every_subset=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BORDERS)
def test_tile_borders(case, dtype):
    queries, keys, heads, head_dim, causal, prefix_len = BORDERS[case]
    ours, plain = pair(causal, prefix_len, None)
    testing.check(ours, plain, inputs(queries, keys, heads, head_dim, batch=1), dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_with_a_common_offset(dtype):
    """The exact gradient of q does not depend on the offset, so a row of gs must sum to 0 far more precisely than `out` is stored."""
    q, k, v = inputs(70, 150, 1, 64, batch=1)
    offset = testing.make(1, 1, 1, 64, seed=4)
    ours, plain = pair(False, 0, KERNELS)
    testing.check(ours, plain, (q, k + 5 * offset, v + offset), dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout, impl):
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = pair(True, 2, impl)
        testing.check(ours, plain, inputs(13, 15, 3, 40), dtype=dtype, layout=testing.LAYOUTS[layout])


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("case", BLIND)
def test_queries_without_keys_give_zero(case, impl):
    queries, keys, heads, head_dim, causal, prefix_len = BLIND[case]
    ours, plain = pair(causal, prefix_len, impl)
    values = inputs(queries, keys, heads, head_dim)
    testing.check(ours, plain, values, dtype=torch.float32, every_subset=True)
    if case == "blind_rows":
        q, k, v = (t.clone().requires_grad_() for t in values)
        out, lse = torch.ops.ov3fast.flash_attention(q, k, v, True, 0, 1.0, "")
        assert (out[:, :4] == 0).all() and (out[:, 4:] != 0).all()
        assert (lse[:, :, :4] == -torch.inf).all() and lse[:, :, 4:].isfinite().all()
        out.sum().backward()
        assert (q.grad[:, :4] == 0).all() and v.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch(impl):
    ours, plain = pair(False, 0, "reference" if impl == "sdpa" else impl)
    testing.check(ours, plain, inputs(3, 3, 2, 8, batch=0), dtype=torch.float32)


def test_long_bfloat16_backward_stays_in_bfloat16():
    """Both sides of the rule by which sdpa's 16-bit backward runs on float32 copies."""
    for length in (peers.SHORT - 1, peers.SHORT + 1):
        ours, plain = pair(True, 0, "sdpa")
        testing.check(ours, plain, inputs(length, length, 1, 24, batch=1), dtype=torch.bfloat16)


def test_bottom_right_alignment_and_prefix():
    q, k, v = inputs(2, 5, 1, 4, batch=1)

    def seen(**how):
        """Which keys query 0 sees: the gradient of its output with respect to v."""
        leaf = v.clone().requires_grad_()
        flash_attention(q, k, leaf, causal=True, **how)[0, 0].sum().backward()
        return (leaf.grad[0, :, 0, 0] != 0).tolist()

    assert seen() == [True, True, True, True, False]
    q = torch.cat([q, q, q[:, :1]], 1)
    assert seen() == [True, False, False, False, False]
    assert seen(prefix_len=3) == [True, True, True, False, False]


def test_logsumexp_and_scale():
    q, k, v = inputs(6, 6, 2, 8)
    exact = torch.logsumexp(0.3 * torch.einsum("bihd,bjhd->bhij", q, k), -1)
    for impl in ("reference", "sdpa", ""):
        narrow = q.float() if not impl else q
        _, lse = torch.ops.ov3fast.flash_attention(narrow, k.to(narrow), v.to(narrow), False, 0, 0.3, impl)
        torch.testing.assert_close(lse, exact.to(lse))
    torch.testing.assert_close(flash_attention(q, k, v, scale=0.3), reference(q, k, v, scale=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_qkvpacked(layout, impl, dtype):
    def ours(qkv):
        return flash_attention_qkvpacked(qkv, causal=True, impl=impl)

    def plain(qkv):
        return reference(*qkv.unbind(2), causal=True)

    testing.check(ours, plain, (testing.make(3, 17, 3, 2, 16),), dtype=dtype, layout=testing.LAYOUTS[layout])


@pytest.mark.backend_independent
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_gradcheck(impl):
    for causal, prefix_len in [(False, 0), (True, 0), (True, 2)]:
        leaves = [t.requires_grad_() for t in inputs(3, 4, 2, 3, batch=1)]
        ours, plain = pair(causal, prefix_len, impl)
        assert torch.autograd.gradcheck(ours, leaves)
        assert torch.autograd.gradcheck(plain, leaves)


@pytest.mark.backend_independent
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    arrange = testing.LAYOUTS[layout]
    q, k, v = (arrange(t.float()).requires_grad_() for t in inputs(4, 5, 2, 8))
    for word in ("reference", "sdpa", ""):
        torch.library.opcheck(torch.ops.ov3fast.flash_attention, (q, k, v, True, 0, 0.5, word))
        qkv = arrange(testing.make(2, 4, 3, 2, 8).float()).requires_grad_()
        torch.library.opcheck(torch.ops.ov3fast.flash_attention_qkvpacked, (qkv, True, 1, 0.5, word))


@pytest.mark.backend_independent
def test_compile_keeps_one_node():
    qkv = testing.make(2, 5, 3, 2, 8).float().requires_grad_()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(qkv):
        return flash_attention_qkvpacked(qkv).square().sum() + flash_attention(*qkv.unbind(2), causal=True).sum()

    torch.compile(step, fullgraph=True, backend=backend)(qkv)
    called = [str(node.target) for node in graphs[0].graph.nodes if "ov3fast" in str(node.target)]
    assert called == ["ov3fast.flash_attention_qkvpacked", "ov3fast.flash_attention"]
    torch.compile(step, fullgraph=True, backend="aot_eager")(qkv).backward()
    got, qkv.grad = qkv.grad.clone(), None
    step(qkv).backward()
    torch.testing.assert_close(got, qkv.grad)


@pytest.mark.backend_independent
@pytest.mark.parametrize("impl", IMPLS)
def test_saved_bytes_are_linear(impl):
    def saved(length):
        qkv = torch.zeros(1, length, 3, 2, 8, requires_grad=True)
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            flash_attention_qkvpacked(qkv, causal=True, impl=impl)
        return sum(kept.values())

    per_token = 4 * (3 * 2 * 8 + 2 * 8 + 2)  # qkv, out, lse
    assert saved(64) == 64 * per_token and saved(640) == 640 * per_token


@pytest.mark.parametrize(("length", "heads"), [(65, 3), (150, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_change_bits(dtype, length, heads):
    q, k, v = (t.to(dtype).requires_grad_() for t in inputs(length, length, heads, 32, batch=1))

    def run():
        out = flash_attention(q, k, v, causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    testing.assert_same_bits_on_threads(run, (1, 2))


@pytest.mark.backend_independent
def test_autocast():
    q, k, v = (t.float() for t in inputs(5, 5, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention(q, k, v).dtype == torch.bfloat16
        assert flash_attention_qkvpacked(torch.stack([q, k, v], 2)).dtype == torch.bfloat16
    assert flash_attention(q, k, v).dtype == torch.float32


@pytest.mark.backend_independent
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_reach_inside(impl):
    """The same bits as on inputs cast by hand: the float32 scores of a backend stay float32."""
    values = [t.bfloat16().requires_grad_() for t in inputs(9, 9, 2, 40)]
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = flash_attention(*values, impl=impl)
            runs.append([out, *torch.autograd.grad(out, values, testing.make(*out.shape).to(out))])
    testing.assert_same_bits(*runs)


@needs_kernels
@settings(max_examples=10 if triton.INTERPRETED else 25, deadline=None, derandomize=True, database=None)
@given(
    queries=st.integers(1, 70) | st.sampled_from([127, 128, 129, 161]),
    keys=st.integers(1, 70) | st.sampled_from([127, 128, 129, 257, 300]),
    head_dim=st.integers(1, 40) | st.sampled_from([64, 72, 80, 130]),
    heads=st.integers(1, 3),
    causal=st.booleans(),
    prefix=st.integers(0, 70),
    scale=st.sampled_from([None, 0.3, -0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(list(testing.LAYOUTS)),
)
@example(161, 257, 72, 1, True, 0, None, torch.bfloat16, "poisoned")
@example(48, 47, 47, 1, True, 9, None, torch.float32, "transposed")
@example(1, 277, 72, 2, False, 0, None, torch.float32, "sliced")
@example(9, 1, 24, 2, False, 0, None, torch.float32, "sliced")
def test_any_shape(queries, keys, head_dim, heads, causal, prefix, scale, dtype, layout):
    how = {"causal": causal, "prefix_len": min(prefix, keys), "scale": scale}
    testing.check(
        lambda *values: flash_attention(*values, **how, impl=KERNELS),
        lambda *values: reference(*values, **how),
        inputs(queries, keys, heads, head_dim, batch=1),
        dtype=dtype,
        layout=testing.LAYOUTS[layout],
    )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_come_out_as_from_pytorch(dtype):
    def compare(**places):
        q, k, v = (t.to(dtype) for t in inputs(19, 35, 1, 16, batch=1))
        for name, (place, value) in places.items():
            {"q": q, "k": k, "v": v}[name][place] = value
        grad = testing.make(*q.shape, seed=3).to(dtype)
        runs = []
        for impl in ("reference", KERNELS):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = flash_attention(*leaves, impl=impl)
            _, lse = torch.ops.ov3fast.flash_attention(q, k, v, False, 0, 0.25, impl)
            runs.append([out, lse, *torch.autograd.grad(out, leaves, grad)])
        for plain, ours in zip(*runs, strict=True):
            assert torch.equal(plain.isnan(), ours.isnan()) and torch.equal(plain.isinf(), ours.isinf())

    compare(q=((0, 3, 0, 5), math.nan))  # one query: its row, and all of grad_k and grad_v
    compare(v=((0, 34, 0, 2), math.nan))
    compare(v=((0, 2, 0, 2), math.inf))
    q_row = (0, 4, 0)
    compare(q=(q_row, -math.inf))  # scores inf and -inf: no number
    compare(k=((0, 5, 0, 1), math.nan))


@needs_kernels
@pytest.mark.parametrize("queries", [1, 2])
def test_rows_of_infinite_scores(queries):
    """Scores of -inf give lse -inf and NaN outputs; a score of inf gives lse inf."""
    for sign, due in ((-1, -math.inf), (1, math.inf)):
        q, k, v = torch.ones(1, queries, 1, 1), torch.full((1, 20, 1, 1), sign * math.inf), torch.ones(1, 20, 1, 1)
        for causal in (False, True):
            out, lse = torch.ops.ov3fast.flash_attention(q, k, v, causal, 0, 1.0, KERNELS)
            assert (lse == due).all() and out.isnan().all()


@needs_kernels
def test_head_dim_over_256_is_left_to_others():
    q, k, v = (t.float() for t in inputs(3, 3, 1, 257))
    assert _dispatch.chosen("flash_attention", "", q, k, v, False, 0, 1.0) == "sdpa"
    with pytest.raises(RuntimeError, match="head_dim must be at most 256, got 257"):
        flash_attention(q, k, v, impl=KERNELS)


@needs_kernels
def test_packed_gradient_is_written_in_place():
    """The packed operator's gradient is one tensor, equal to the gradients of its three parts."""
    qkv = testing.make(2, 21, 3, 2, 24).float()
    grad = testing.make(2, 21, 2, 24, seed=1).float()
    leaf = qkv.clone().requires_grad_()
    parts = [t.clone().requires_grad_() for t in qkv.unbind(2)]
    whole = torch.autograd.grad(flash_attention_qkvpacked(leaf, impl=KERNELS), leaf, grad)
    apart = torch.autograd.grad(flash_attention(*parts, impl=KERNELS), parts, grad)
    testing.assert_same_bits(whole, [torch.stack(apart, 2)])


@needs_kernels
def test_choice_of_the_kernels():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (t.to(dtype) for t in inputs(5, 3, 2, 8))
        assert _dispatch.chosen("flash_attention", "", q, k, v, True, 0, 1.0) == KERNELS
        qkv = torch.stack([q, q, q], 2)
        assert _dispatch.chosen("flash_attention_qkvpacked", "", qkv, True, 0, 1.0) == KERNELS


@pytest.mark.backend_independent
def test_choice_among_the_others():
    q, k, v = inputs(5, 3, 2, 8)
    assert _dispatch.chosen("flash_attention", "", q, k, v, False, 0, 1.0) == "sdpa"
    assert _dispatch.chosen("flash_attention", "", q, k, v, True, 0, 1.0) == "eager"
    assert _dispatch.chosen("flash_attention", "", q, k, v, True, 1, 1.0) == "sdpa"


@pytest.mark.backend_independent
def test_cuda_kernels_take_our_arguments():
    """PyTorch's CUDA kernels on meta tensors: our arguments match their signatures, and their outputs our contract."""
    q, k, v = (torch.empty(2, n, 2, 8, dtype=torch.bfloat16, device="meta") for n in (5, 7, 7))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, None, None, 5, 7, 0.0, True, False, scale=0.5)
    assert out.shape == q.shape and lse.shape == (2, 2, 5) and lse.dtype == torch.float32
    rng = torch.empty(0, dtype=torch.uint64, device="meta")
    grads = torch.ops.aten._flash_attention_backward(q, q, k, v, out, lse, None, None, 5, 7, 0.0, True, rng, rng, scale=0.5)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.backend_independent
def test_cudnn_takes_our_arguments():
    q, k, v = (torch.empty(2, n, 3, 8, dtype=torch.bfloat16, device="meta") for n in (5, 7, 7))
    out, lse = peers.cudnn_forward(q, k, v, False, 0, 0.5)
    assert out.shape == q.shape and out.is_contiguous() and lse.shape == (2, 3, 5) and lse.dtype == torch.float32


@pytest.mark.backend_independent
def test_flash_attention_3_is_called_by_its_names(monkeypatch):
    """Against a stand-in with that package's arguments and results."""
    plain = torch.ops.ov3fast

    def _flash_attn_forward(q, k, v, *, softmax_scale, causal):
        return *plain.flash_attention(q, k, v, causal, 0, softmax_scale, "reference"), None, None

    def _flash_attn_backward(grad_out, q, k, v, out, lse, *, dq, dk, dv, softmax_scale, is_causal, deterministic):
        assert deterministic
        grads = plain.flash_attention_backward(grad_out, q, k, v, out, lse, is_causal, 0, softmax_scale, "reference")
        for to, grad in zip((dq, dk, dv), grads, strict=True):
            to.copy_(grad)

    package = types.SimpleNamespace(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    q, k, v = (t.float() for t in inputs(5, 7, 2, 8))
    expected = plain.flash_attention(q, k, v, True, 0, 0.3, "reference")
    testing.assert_same_bits(peers.flash_attn_3_forward(q, k, v, True, 0, 0.3), expected)
    expected_grads = plain.flash_attention_backward(q, q, k, v, *expected, True, 0, 0.3, "reference")
    testing.assert_same_bits(peers.flash_attn_3_backward(q, q, k, v, *expected, True, 0, 0.3), expected_grads)


@pytest.mark.backend_independent
@pytest.mark.parametrize("row", peers.PREFERENCES, ids=lambda row: f"{row.capability}-{row.direction}-{row.head_dims[0]}")
def test_choice_on_a_gpu(monkeypatch, row):
    """The rule for each GPU generation with everything installed, then with only Triton, then for calls that no library supports."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (row.capability, 0))
    monkeypatch.setattr(
        peers, "_cuda_unsupported_reason", lambda q, k, causal, prefix_len, dtypes=(): "no prefix" if prefix_len else None
    )
    device = types.SimpleNamespace(type="cuda")
    backends = _dispatch._backends["flash_attention"]
    absent = {name: dataclasses.replace(backend, unavailable_reason=lambda: "not here") for name, backend in backends.items()}
    ready = {name: dataclasses.replace(backend, unavailable_reason=lambda: None) for name, backend in backends.items()}
    triton_alone = dataclasses.replace(ready["triton"], unsupported_reason=lambda *_: None)
    selector = next(
        s for s in _dispatch._selectors if s.op == "flash_attention" and s.backward == (row.direction == "backward")
    )

    def chosen(head_dim, keys, prefix_len=0):
        q = types.SimpleNamespace(device=device, shape=(2, keys, 4, head_dim), numel=lambda: 1)
        tensors = (q,) * (6 if selector.backward else 3)
        return selector.select_backend("", (*tensors, True, prefix_len, 1.0))

    for others, expected in ((ready, row.backends[0]), (absent, "triton")):
        monkeypatch.setitem(_dispatch._backends, "flash_attention", {**others, "triton": triton_alone})
        for head_dim in row.head_dims:
            assert chosen(head_dim, max(row.keys, 64)) == expected
            assert row.keys == 1 or chosen(head_dim, row.keys - 1) == "triton"
            assert chosen(head_dim, max(row.keys, 64), prefix_len=5) == "triton"


@pytest.mark.backend_independent
def test_preferences_do_not_overlap():
    for row in peers.PREFERENCES:
        same = [r for r in peers.PREFERENCES if (r.capability, r.direction) == (row.capability, row.direction)]
        assert [r for r in same if r.head_dims[0] <= row.head_dims[1] and row.head_dims[0] <= r.head_dims[1]] == [row]
        assert row.reason and all(name in _dispatch.PREFERENCE for name in row.backends)
        # PyTorch's backward through cuDNN is not deterministic.
        assert row.direction == "forward" or "cudnn" not in row.backends


@pytest.mark.backend_independent
def test_flash_attention_of_pytorch_is_deterministic_backward(monkeypatch):
    seen = []

    def backward(*args, **options):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory))

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    q = torch.empty(2, 5, 2, 8, dtype=torch.bfloat16, device="meta")
    peers.cuda_flash_backward(q, q, q, q, q, q[..., 0], False, 0.5)
    assert seen == [(True, False)]
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.backend_independent
def test_peers_say_why_not():
    q, k, v = (t.float() for t in inputs(4, 4, 1, 8))
    table = ops.table()["flash_attention"]
    assert table["eager"] == table["sdpa"] == "ready"
    for peer in ("flash_attn", "flash_attn_3", "cudnn", "xformers"):
        if table[peer] != "ready":
            with pytest.raises(RuntimeError, match=f"impl='{peer}' can't run this call: .*(not installed|CUDA)"):
                flash_attention(q, k, v, impl=peer)
    assert "CUDA" in peers.flash_attn_unsupported_reason(q, k, v, False, 0, 1.0)
    assert "CUDA" in peers.xformers_unsupported_reason(q, k, v, False, 0, 1.0)
    assert "CUDA" in peers.cudnn_unsupported_reason(q, k, v, False, 0, 1.0)


@pytest.mark.backend_independent
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": None}, TypeError, "flash_attention: q must be a tensor, got NoneType"),
        ({"q": torch.ones(2, 4, 8)}, ValueError, r"q must have 4 dimensions, got shape \(2, 4, 8\)"),
        ({"k": torch.ones(2, 4, 3, 8)}, ValueError, r"k must have shape \(2, 4, 2, 8\) \[B,Nk,H,D\], got \(2, 4, 3, 8\)"),
        ({"v": torch.ones(2, 5, 2, 8)}, ValueError, r"v must have shape \(2, 4, 2, 8\) like k"),
        ({"v": torch.ones(2, 4, 2, 8).double()}, TypeError, "v must be of dtype float32, got float64"),
        ({"prefix_len": 5}, ValueError, "prefix_len must be between 0 and the number of keys 4, got 5"),
        ({"causal": "yes"}, TypeError, "causal must be True or False, got str"),
        ({"impl": "mkl"}, ValueError, "impl must be one of triton, flash_attn_3, flash_attn, cudnn, xformers, .*; got 'mkl'"),
    ],
)
def test_errors(change, error, words):
    one = torch.ones(2, 4, 2, 8)
    with pytest.raises(error, match=words):
        flash_attention(**{"q": one, "k": one, "v": one, **change})


@pytest.mark.backend_independent
def test_packed_errors():
    with pytest.raises(ValueError, match=r"qkv must have shape \[B,N,3,H,D\], got \(2, 4, 2, 2, 8\)"):
        flash_attention_qkvpacked(torch.ones(2, 4, 2, 2, 8))
    with pytest.raises(RuntimeError, match="impl='sdpa' can't run this call: it takes no empty tensor"):
        flash_attention_qkvpacked(torch.ones(0, 4, 3, 2, 8), impl="sdpa")
