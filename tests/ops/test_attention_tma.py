"""Attention's forward with TMA descriptors, in Triton's interpreter; tests/kernels inspects the compiled code."""

import pytest
import torch

from ov3fast import testing
from ov3fast.ops import _dispatch, triton
from ov3fast.ops.flash_attention import flash_attention, flash_attention_qkvpacked, reference

if not triton.INTERPRETED:
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)

from ov3fast.kernels.attention import tma
from ov3fast.kernels.attention.tiles import size_class
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib.common import TYPES
from ov3fast.kernels.lib.config import Config

VARIANTS = {"tma": (1, 0), "warp-specialized": (1, 1)}
# queries, keys, heads, head_dim, causal, prefix_len
CASES = {
    "one": (1, 1, 1, 8, False, 0),
    "ragged_64": (65, 97, 2, 64, False, 0),
    "causal_72": (70, 81, 1, 72, True, 0),
    "prefix_128": (33, 75, 1, 128, True, 40),
    "whole_blocks_80": (64, 64, 1, 80, True, 0),
    "blind_rows": (50, 20, 1, 24, True, 0),
}


def within(q, variant):
    """The configuration of `variant` for q's head dimension, with small blocks."""
    described, specialized = variant
    blocks = {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32, "TMA": described, "WARP_SPECIALIZED": specialized}
    return configs.trying({("flash_attention_forward", TYPES[q.dtype], size_class(q.shape[-1])): Config(blocks)})


@pytest.fixture
def launched(monkeypatch):
    """Records the inputs of each launch through TMA."""
    calls = []
    before = tma.with_workspace
    monkeypatch.setattr(
        "ov3fast.kernels.attention.launch.with_workspace", lambda launch, q: (calls.append(q), before(launch, q))
    )
    return calls


def inputs(queries, keys, heads, head_dim, dtype):
    """q, k and v inside larger tensors of NaN, with row strides that are multiples of 16 bytes."""

    def view(rows, seed):
        room = torch.full((3, rows + 2, heads + 1, head_dim + 8), torch.nan, dtype=dtype)
        return room[1:, 1:-1, :-1, :head_dim].copy_(testing.make(2, rows, heads, head_dim, seed=seed))

    return view(queries, 0), view(keys, 1), view(keys, 2)


def check(ours, q, k, v, how):
    due, same = reference(q.double(), k.double(), v.double(), **how), reference(q, k, v, **how)
    testing.assert_within_budget(ours, same, due, "out")


def attend(*args):
    """(out, lse) of the Triton backend, called directly since the operator rejects float16 on a CPU."""
    return _dispatch._backends["flash_attention"]["triton"].forward(*args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_parity_and_the_same_bits(case, variant, dtype, launched):
    """Within the budget, and bitwise equal to plain loads with the same blocks."""
    *sizes, causal, prefix_len = CASES[case]
    q, k, v = inputs(*sizes, dtype)
    how = {"causal": causal, "prefix_len": prefix_len}
    with within(q, VARIANTS[variant]):
        out, lse = attend(q, k, v, causal, prefix_len, sizes[-1] ** -0.5)
    assert len(launched) == 1
    check(out, q, k, v, how)
    with within(q, (0, 0)):
        testing.assert_same_bits(attend(q, k, v, causal, prefix_len, sizes[-1] ** -0.5), [out, lse])


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.3])
def test_scale(scale, launched):
    q, k, v = inputs(40, 40, 1, 64, torch.bfloat16)
    with within(q, VARIANTS["warp-specialized"]):
        check(flash_attention(q, k, v, scale=scale), q, k, v, {"scale": scale})
    assert launched


def test_packed_and_heads_in_front(launched):
    """Views of qkv, and of tensors [B,H,N,D]."""
    qkv = testing.make(2, 37, 3, 2, 64).bfloat16()
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv.unbind(2))
    with within(qkv, VARIANTS["tma"]):
        packed, apart = flash_attention_qkvpacked(qkv, causal=True), flash_attention(q, k, v, causal=True)
    assert len(launched) == 2
    check(packed, *qkv.unbind(2), {"causal": True})
    testing.assert_same_bits(packed, apart)


def test_what_does_not_fit_is_loaded_without(launched):
    whole = {"unaligned rows": (9, 11, 2, 20, torch.bfloat16), "float32": (9, 11, 2, 64, torch.float32)}
    calls = {name: inputs(*sizes) for name, sizes in whole.items()}
    q, k, v = inputs(9, 11, 2, 64, torch.bfloat16)
    calls["an odd address"] = testing.poisoned(q), k, v
    calls["one row for all"] = q, k[:, :1].expand(-1, 11, -1, -1), v
    calls["no keys"] = q, k[:, :0], v[:, :0]
    for name, (q, k, v) in calls.items():
        assert not tma.fits(q, k, v), name
        with within(q, VARIANTS["tma"]):
            check(flash_attention(q, k, v), q, k, v, {})
    assert not launched


def test_launches_leave_the_callers_allocator():
    """Triton keeps one allocator per context."""
    from triton.runtime import _allocation

    before, seen = _allocation._allocator.get(), []
    tma.with_workspace(lambda: seen.append(_allocation._allocator.get()(384, 128, None)), torch.zeros(3, dtype=torch.bfloat16))
    assert seen[0].dtype == torch.int8 and seen[0].numel() == 384 and _allocation._allocator.get() is before
