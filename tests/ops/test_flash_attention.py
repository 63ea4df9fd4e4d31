import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops import _attention_peers as peers
from ov3fast.ops import _dispatch
from ov3fast.ops.flash_attention import flash_attention, flash_attention_qkvpacked, reference

IMPLS = ["reference", "sdpa", None]
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
        """Which keys move query 0: the gradient of its output by v."""
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
    for impl in ("reference", "sdpa"):
        _, lse = torch.ops.ov3fast.flash_attention(q, k, v, False, 0, 0.3, impl)
        torch.testing.assert_close(lse, exact)
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


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_gradcheck(impl):
    for causal, prefix_len in [(False, 0), (True, 0), (True, 2)]:
        leaves = [t.requires_grad_() for t in inputs(3, 4, 2, 3, batch=1)]
        ours, plain = pair(causal, prefix_len, impl)
        assert torch.autograd.gradcheck(ours, leaves)
        assert torch.autograd.gradcheck(plain, leaves)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout):
    arrange = testing.LAYOUTS[layout]
    q, k, v = (arrange(t.float()).requires_grad_() for t in inputs(4, 5, 2, 8))
    for word in ("reference", "sdpa"):
        torch.library.opcheck(torch.ops.ov3fast.flash_attention, (q, k, v, True, 0, 0.5, word))
        qkv = arrange(testing.make(2, 4, 3, 2, 8).float()).requires_grad_()
        torch.library.opcheck(torch.ops.ov3fast.flash_attention_qkvpacked, (qkv, True, 1, 0.5, word))


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


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
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


def test_thread_count_does_not_change_bits():
    q, k, v = (t.float().requires_grad_() for t in inputs(65, 65, 3, 32))
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = flash_attention(q, k, v, causal=True)
            runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(threads)
    testing.assert_same_bits(*runs)


def test_autocast():
    q, k, v = (t.float() for t in inputs(5, 5, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention(q, k, v).dtype == torch.bfloat16
        assert flash_attention_qkvpacked(torch.stack([q, k, v], 2)).dtype == torch.bfloat16
    assert flash_attention(q, k, v).dtype == torch.float32


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_autocast_does_not_reach_inside(impl):
    """The same bits as on inputs cast by hand: the float32 scores of a backend stay float32."""
    values = [t.bfloat16().requires_grad_() for t in inputs(9, 9, 2, 40)]
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = flash_attention(*values, impl=impl)
            runs.append([out, *torch.autograd.grad(out, values, testing.make(*out.shape).to(out))])
    testing.assert_same_bits(*runs)


def test_choice():
    q, k, v = (t.float() for t in inputs(5, 3, 2, 8))
    assert _dispatch.chosen("flash_attention", "", q, k, v, False, 0, 1.0) == "sdpa"
    assert _dispatch.chosen("flash_attention", "", q, k, v, True, 0, 1.0) == "reference"
    assert _dispatch.chosen("flash_attention", "", q, k, v, True, 1, 1.0) == "sdpa"


def test_cuda_kernels_take_our_arguments():
    """PyTorch's CUDA kernels on shapes alone: what we pass fits what they take, and what they give fits our contract."""
    q, k, v = (torch.empty(2, n, 2, 8, dtype=torch.bfloat16, device="meta") for n in (5, 7, 7))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, None, None, 5, 7, 0.0, True, False, scale=0.5)
    assert out.shape == q.shape and lse.shape == (2, 2, 5) and lse.dtype == torch.float32
    rng = torch.empty(0, dtype=torch.uint64, device="meta")
    grads = torch.ops.aten._flash_attention_backward(q, q, k, v, out, lse, None, None, 5, 7, 0.0, True, rng, rng, scale=0.5)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_peers_say_why_not():
    q, k, v = (t.float() for t in inputs(4, 4, 1, 8))
    table = ops.table()["flash_attention"]
    assert table["reference"] == table["sdpa"] == "ready"
    for peer in ("flash_attn", "xformers"):
        if table[peer] != "ready":
            with pytest.raises(RuntimeError, match=f"impl='{peer}' can't run this call: .*(not installed|CUDA)"):
                flash_attention(q, k, v, impl=peer)
    assert "CUDA" in peers.flash_attn_refuses(q, k, v, False, 0, 1.0)
    assert "CUDA" in peers.xformers_refuses(q, k, v, False, 0, 1.0)


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
        ({"impl": "cudnn"}, ValueError, "impl must be one of flash_attn, xformers, sdpa, reference; got 'cudnn'"),
    ],
)
def test_errors(change, error, words):
    one = torch.ones(2, 4, 2, 8)
    with pytest.raises(error, match=words):
        flash_attention(**{"q": one, "k": one, "v": one, **change})


def test_packed_errors():
    with pytest.raises(ValueError, match=r"qkv must have shape \[B,N,3,H,D\], got \(2, 4, 2, 2, 8\)"):
        flash_attention_qkvpacked(torch.ones(2, 4, 2, 2, 8))
    with pytest.raises(RuntimeError, match="impl='sdpa' can't run this call: it takes no empty tensor"):
        flash_attention_qkvpacked(torch.ones(0, 4, 3, 2, 8), impl="sdpa")
