"""latent_projection's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools import launches

from ov3fast import testing
from ov3fast.kernels import latent_projection as kernels
from ov3fast.kernels.aot.cases import latent_projection as cases
from ov3fast.kernels.lib import config as configs
from ov3fast.ops import triton
from ov3fast.ops.latent_projection import reference

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="runs compiled code")


def inputs(batch, grid, width, channels, patch, dtype):
    """tokens, weight, bias, grad_x."""
    rows = channels * patch**2
    values = (
        testing.make(batch, grid[0] * grid[1], width),
        testing.make(rows, width, seed=1),
        testing.make(rows, seed=2),
        testing.make(batch, channels, grid[0] * patch, grid[1] * patch, seed=3),
    )
    return [v.to(dtype) for v in values]


def expected(*values, grid, patch):
    *leaves, grad_x = (v.detach().requires_grad_() for v in values)
    x = reference(*leaves, patch_size=patch, grid=grid)
    return [x.detach(), *torch.autograd.grad(x, leaves, grad_x.detach())]


def run(values, grid, patch, order="forward", layout=torch.Tensor.contiguous, target="sm_80"):
    tokens, weight, bias, grad_x = (layout(v) for v in values)
    with launches.compiled(order, target) as reports:
        x = kernels.forward(tokens, weight, bias, patch, *grid)
        grads = kernels.backward(grad_x, tokens, weight, patch, True, True, True)
    return [x, *grads], reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "layout", "target"),
    [
        ((3, (6, 4), 72, 16, 2), "contiguous", "sm_80"),
        ((3, (6, 4), 72, 16, 2), "contiguous", "sm_90"),
        ((2, (3, 5), 35, 5, 2), "poisoned", "sm_80"),
        ((2, (3, 2), 17, 9, 3), "contiguous", "sm_80"),
    ],
)
def test_within_budget(dtype, sizes, layout, target):
    values, where = inputs(*sizes, dtype), dict(grid=sizes[1], patch=sizes[4])
    results, _ = run(values, **where, layout=testing.LAYOUTS[layout], target=target)
    testing.Budget(lambda values: expected(*values, **where), values).check(results, ("x", "tokens", "weight", "bias"))


def test_program_order_does_not_matter():
    values = inputs(5, (6, 6), 130, 17, 2, torch.bfloat16)
    results = [run(values, (6, 6), 2, order)[0] for order in launches.ORDERS]
    for other in results[1:]:
        testing.assert_same_bits(results[0], other)


def row(kernel):
    return configs.pick(f"latent_projection_{kernel}", "bf16")


def test_traffic():
    batch, grid, width, channels, patch = sizes = 4, (8, 8), 128, 16, 2
    _, reports = run(inputs(*sizes, torch.bfloat16), grid, patch)
    call = batch * grid[0] * grid[1], channels * patch**2
    launches.assert_traffic(
        reports["latent_projection_forward"][0], cases.forward_work(*call, width, "bf16", row("forward")).bytes, "bias"
    )
    launches.assert_traffic(
        reports["latent_projection_grad_tokens"][0],
        cases.grad_tokens_work(*call, width, "bf16", row("grad_tokens")).bytes,
        "bias",
    )
    launches.assert_traffic(
        reports["latent_projection_grad_weight"][0],
        cases.grad_weight_work(*call, width, "bf16", row("grad_weight")).bytes,
        "bias",
    )
    launches.assert_traffic(
        reports["latent_projection_grad_bias"][0], cases.grad_bias_work(*call, "bf16", row("grad_bias")).bytes, "bias"
    )
    for name in ("latent_projection_forward", "latent_projection_grad_tokens", "latent_projection_grad_weight"):
        assert reports[name][0].mma_count > 0
