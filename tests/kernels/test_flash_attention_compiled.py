"""Executes flash_attention's sm_80 and sm_90 code on the CPU through the real launchers, checking every access."""

import pytest
import torch
from kernel_tools import launches

from ov3fast import testing
from ov3fast.kernels.aot.cases.attention import traffic
from ov3fast.kernels.attention.launch import backward, forward
from ov3fast.kernels.attention.tiles import size_class
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib.common import TYPES
from ov3fast.ops.flash_attention import reference

# queries, keys, heads, head_dim, causal, prefix_len: more than one block of queries and of keys, none of them full
CASES = {
    "head_dim_64": (70, 90, 1, 64, False, 0),
    "head_dim_72_causal": (150, 81, 1, 72, True, 3),
    "head_dim_128_causal": (65, 97, 1, 128, True, 0),
    "head_dim_192_causal": (70, 75, 1, 192, True, 0),
}


def make(queries, keys, heads, head_dim, dtype):
    """q, k, v and an upstream gradient. k and v are views of one packed tensor; a head of NaN is adjacent to q's."""
    room = torch.full((1, queries + 1, heads + 1, head_dim), torch.nan, dtype=dtype)
    q = room[:, :-1, :-1]
    q.copy_(testing.make(1, queries, heads, head_dim))
    kv = torch.stack([testing.make(1, keys, heads, head_dim, seed=seed) for seed in (1, 2)], 2).to(dtype)
    return q, *kv.unbind(2), testing.make(1, queries, heads, head_dim, seed=3).to(dtype)


def run(q, k, v, grad, causal, prefix_len, order="forward", target="sm_80"):
    """out, grad_q, grad_k, grad_v, and kernel -> report of its launch. Fails on any finding."""
    options = causal, prefix_len, q.shape[-1] ** -0.5
    with launches.compiled(order, target) as reports:
        out, lse = forward(q, k, v, *options)
        grads = backward(grad, q, k, v, out, lse, *options)
    return [out, *grads], {name: report for name, (report,) in reports.items()}


def expected(q, k, v, grad, causal, prefix_len):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = reference(*leaves, causal=causal, prefix_len=prefix_len)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(values, causal, prefix_len, target="sm_80"):
    """Asserts that the results are within budget; returns the reports."""
    results, reports = run(*values, causal, prefix_len, target=target)
    budget = testing.Budget(lambda values: expected(*values, causal, prefix_len), values)
    budget.check(results, ("out", "grad_q", "grad_k", "grad_v"))
    return reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_compiled_code(case, dtype):
    """A float32 product is three TF32 products; with its narrower tiles some threads load less than 16 bytes."""
    *sizes, causal, prefix_len = CASES[case]
    reports = check(make(*sizes, dtype), causal, prefix_len)
    assert len(reports) == 3
    for name, report in reports.items():
        config = configs.pick(name, TYPES[dtype], size_class(sizes[-1]), "sm_80")
        small = ("lse", "delta", "weight") if dtype == torch.float32 else ()
        launches.assert_traffic(report, traffic(name, TYPES[dtype], config, 1, *sizes, causal, prefix_len), *small)
        assert report.mma_count and report.share16() > (0.7 if dtype == torch.float32 else 0.9), report


@pytest.mark.parametrize(("case", "dtype"), [("head_dim_64", torch.float16), ("head_dim_72_causal", torch.bfloat16)])
def test_compiled_code_of_sm_90(case, dtype):
    *sizes, causal, prefix_len = CASES[case]
    for report in check(make(*sizes, dtype), causal, prefix_len, "sm_90").values():
        assert "wgmma" in str(report.mma), report


def test_compiled_code_without_alignment():
    values = make(9, 21, 1, 20, torch.bfloat16)
    check([testing.poisoned(value) for value in values], True, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_program_order_does_not_matter(dtype):
    values = make(70, 70, 2, 64, dtype)
    due, _ = run(*values, True, 0)
    for order in launches.ORDERS[1:]:
        again, _ = run(*values, True, 0, order)
        testing.assert_same_bits(again, due)
