"""noise_projection's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools import launches

from ov3fast import testing
from ov3fast.kernels import noise_projection as kernels
from ov3fast.kernels.aot.cases.noise_projection import draw_work, grad_sigma_work
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib import gemm
from ov3fast.ops import random, triton
from ov3fast.ops.noise_projection import reference

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="runs compiled code")
RNG = random.make_rng(21, 2**32 - 2)


def inputs(batch, tokens, width, features, dtype):
    """z, sigma, weight, bias, grad_y."""
    return [
        v.to(dtype)
        for v in (
            testing.make(batch, tokens, width),
            testing.make(batch, seed=1).abs(),
            testing.make(features, width, seed=2),
            testing.make(features, seed=3),
            testing.make(batch, tokens, features, seed=4),
        )
    ]


def expected(z, sigma, weight, bias, grad_y):
    leaves = [v.detach().requires_grad_() for v in (z, sigma, weight, bias)]
    y = reference(*leaves, rng=RNG)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def run(values, order="forward", layout=torch.Tensor.contiguous, target="sm_80"):
    z, sigma, weight, bias, grad_y = (layout(v) for v in values)
    with launches.compiled(order, target) as reports:
        y = kernels.forward(z, sigma, weight, bias, RNG)
        grads = kernels.backward(grad_y, z, sigma, weight, RNG, True, True, True, True)
    return [y, *grads], reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "layout", "target"),
    [
        ((2, 70, 72, 136), "contiguous", "sm_80"),
        ((2, 70, 72, 136), "contiguous", "sm_90"),
        ((3, 11, 35, 17), "poisoned", "sm_80"),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_within_budget(monkeypatch, dtype, sizes, layout, target, small):
    monkeypatch.setattr(gemm, "is_small", lambda *_: small)
    values = inputs(*sizes, dtype)
    results, _ = run(values, layout=testing.LAYOUTS[layout], target=target)
    testing.Budget(lambda values: expected(*values), values).check(results, ("y", "z", "sigma", "weight", "bias"))


def test_program_order_does_not_matter():
    values = inputs(3, 50, 40, 130, torch.bfloat16)
    results = [run(values, order)[0] for order in launches.ORDERS]
    for other in results[1:]:
        testing.assert_same_bits(results[0], other)


def test_traffic():
    batch, tokens, width, _ = sizes = 2, 128, 144, 160
    _, reports = run(inputs(*sizes, torch.bfloat16))
    rows, config = batch * tokens, configs.pick("noise_projection_draw", "bf16")
    forward, backward = reports["noise_projection_draw"]
    [sums] = reports["noise_projection_grad_sigma"]
    launches.assert_traffic(forward, draw_work(rows, width, True, False, "bf16", config).bytes, "rng", "sigma")
    launches.assert_traffic(backward, draw_work(rows, width, True, True, "bf16", config).bytes, "rng", "sigma")
    launches.assert_traffic(sums, grad_sigma_work(batch, rows, width, "bf16", config).bytes)


@pytest.mark.parametrize(("needs", "launched"), [((1, 0, 0, 1), 0), ((0, 1, 0, 0), 2), ((0, 0, 1, 0), 1), ((1, 1, 1, 1), 2)])
def test_noise_is_drawn_where_a_gradient_needs_it(needs, launched):
    """For sigma and the weight alone, and once for both."""
    z, sigma, weight, _, grad_y = values = inputs(2, 5, 24, 8, torch.bfloat16)
    whole = expected(*values)[1:]
    with launches.on_ptx() as reports:
        grads = kernels.backward(grad_y, z, sigma, weight, RNG, *map(bool, needs))
    assert sum("noise_projection" in name for name, _ in reports) == launched
    for needed, grad, other in zip(needs, grads, whole, strict=True):
        assert grad.numel() == (other.numel() if needed else 0)
