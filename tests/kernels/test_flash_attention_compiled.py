"""The sm_80 code of flash_attention's kernels, executed on the CPU with every access checked; the launchers are the real ones."""

import pytest
import torch

from ov3fast import testing
from ov3fast.ops.flash_attention import reference

ptxrun = pytest.importorskip("ptxrun")
pytest.importorskip("triton")
fa = pytest.importorskip("ov3fast.kernels.flash_attention")

KERNELS = ["_flash_attention_forward", "_flash_attention_grad_q", "_flash_attention_grad_kv"]
# queries, keys, heads, head_dim, causal, prefix_len: more than one block of queries and of keys, none of them full
CASES = {
    "head_dim_64": (70, 90, 1, 64, False, 0),
    "head_dim_72_causal": (150, 81, 1, 72, True, 3),
    "head_dim_128_causal": (65, 97, 1, 128, True, 0),
}


class Executed:
    """Stands where a kernel stands: its compiled code runs over the tensors, in a given order of programs."""

    def __init__(self, kernel, order):
        self.kernel, self.order, self.reports = kernel, order, []

    def __getitem__(self, grid):
        def launch(*args, num_warps, num_stages, **constexprs):
            names = [p.name for p in self.kernel.params if not p.is_constexpr]
            report = ptxrun.run(
                self.kernel, grid, dict(zip(names, args, strict=True)), constexprs, "sm_80", num_warps, num_stages, order=self.order
            )
            self.reports.append(report)

        return launch


@pytest.fixture
def executed(monkeypatch):
    """Call with an order: from then on the launchers execute compiled code. Returns name -> Executed."""
    kernels = {name: getattr(fa, name) for name in KERNELS}

    def install(order):
        stand_ins = {name: Executed(kernel, order) for name, kernel in kernels.items()}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(fa, name, stand_in)
        return stand_ins

    return install


def packed(queries, keys, heads, head_dim, dtype):
    """q, k, v and an upstream gradient; k and v lie in one packed tensor, with NaN around q."""
    q = testing.poisoned(testing.make(1, queries, heads, head_dim).to(dtype))
    kv = torch.stack([testing.make(1, keys, heads, head_dim, seed=seed) for seed in (1, 2)], 2).to(dtype)
    return q, *kv.unbind(2), testing.make(1, queries, heads, head_dim, seed=3).to(dtype)


def run(q, k, v, grad, causal, prefix_len):
    scale = q.shape[-1] ** -0.5
    out, lse = fa.forward(q, k, v, causal, prefix_len, scale)
    return [out, lse, *fa.backward(grad, q, k, v, out, lse, causal, prefix_len, scale)]


def expected(dtype, q, k, v, grad, causal, prefix_len):
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out = reference(*leaves, causal=causal, prefix_len=prefix_len)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_compiled_code(case, dtype, executed):
    *sizes, causal, prefix_len = CASES[case]
    values = packed(*sizes, dtype)
    kernels = executed("forward")
    out, lse, *grads = run(*values, causal, prefix_len)
    exact = expected(torch.float64, *values, causal, prefix_len)
    plain = expected(dtype, *values, causal, prefix_len)
    for got, same, best, what in zip([out, *grads], plain, exact, ("out", "grad_q", "grad_k", "grad_v"), strict=True):
        testing.assert_within_budget(got, same, best, what)
    for name, stand_in in kernels.items():
        (report,) = stand_in.reports
        assert report.ok, report
        assert any("mma" in instruction for instruction in report.mma), report
        moved = report.bytes_read() + report.bytes_written()
        due = fa.traffic(name, dtype.itemsize, 1, *sizes, causal, prefix_len)
        assert abs(moved - due) <= 0.1 * due, f"{name}: moved {moved} bytes, not {due}; {report.per_tensor}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_program_order_does_not_matter(dtype, executed):
    *sizes, causal, prefix_len = (70, 70, 2, 64, True, 0)
    values = packed(*sizes, dtype)
    executed("forward")
    due = run(*values, causal, prefix_len)
    for order in ("reversed", "shuffled"):
        executed(order)
        testing.assert_same_bits(run(*values, causal, prefix_len), due)
