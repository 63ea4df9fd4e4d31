"""group_norm_silu's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools import launches

from ov3fast import testing
from ov3fast.kernels import group_norm_silu as kernels
from ov3fast.kernels.aot.cases.group_norm_silu import elementwise_work, partials_work
from ov3fast.kernels.lib import config as configs
from ov3fast.ops import triton
from ov3fast.ops.group_norm_silu import reference

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="runs compiled code")
PARAMETERS = "weight", "bias", "mean", "rstd", "means"
LAYOUTS = {
    "plain": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "poisoned": testing.poisoned,
}


def inputs(*shape, dtype, mean=0.0):
    """x, weight, bias, grad_y."""
    values = (
        testing.make(*shape) + mean,
        testing.make(shape[1], seed=1),
        testing.make(shape[1], seed=2),
        testing.make(*shape, seed=3),
    )
    return [v.to(dtype) for v in values]


def expected(x, weight, bias, grad_y, groups):
    leaves = [v.detach().requires_grad_() for v in (x, weight, bias)]
    y = reference(leaves[0], groups, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def run(values, groups, layout, order="forward", target="sm_80"):
    x, weight, bias, grad_y = (LAYOUTS[layout](v) for v in values)
    with launches.compiled(order, target) as reports:
        y, mean, rstd = kernels.forward(x, groups, weight, bias, 1e-6)
        grads = kernels.backward(grad_y, x, weight, bias, mean, rstd, True, True, True)
    return [y, *grads], reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups", "layout", "target"),
    [
        ((2, 24, 9, 8), 3, "channels_last", "sm_80"),
        ((2, 24, 9, 8), 3, "channels_last", "sm_90"),
        ((2, 12, 20, 16), 3, "plain", "sm_80"),
        ((1, 6, 33, 37), 2, "plain", "sm_80"),
        ((1, 6, 33, 37), 2, "plain", "sm_90"),
        ((1, 70, 5, 5), 7, "plain", "sm_80"),
        ((2, 6, 7, 5), 2, "poisoned", "sm_80"),
    ],
)
def test_within_budget(dtype, shape, groups, layout, target):
    values = inputs(*shape, dtype=dtype)
    results, _ = run(values, groups, layout, target=target)
    testing.Budget(lambda values: expected(*values, groups), values).check(results, ("y", "x", "weight", "bias"))


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_digits_at_a_mean_far_from_zero(layout):
    values = inputs(1, 8, 30, 30, dtype=torch.float32, mean=30.0)
    results, _ = run(values, 2, layout)
    testing.Budget(lambda values: expected(*values, 2), values).check(results, ("y", "x", "weight", "bias"))


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_program_order_does_not_matter(layout):
    values = inputs(2, 70, 17, 19, dtype=torch.bfloat16)
    results = [run(values, 7, layout, order)[0] for order in launches.ORDERS]
    for other in results[1:]:
        testing.assert_same_bits(results[0], other)


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_traffic(layout):
    batch, channels, places, groups = 1, 64, 1024, 8
    _, reports = run(inputs(batch, channels, 32, 32, dtype=torch.bfloat16), groups, layout)
    sizes = batch, channels, places, layout
    for backward, name in ((False, "forward"), (True, "backward")):
        sums, each = (configs.pick(f"group_norm_silu_{name}{suffix}", "bf16", layout) for suffix in ("_partials", ""))
        (partials,), (elementwise,) = reports[f"group_norm_silu_{name}_partials"], reports[f"group_norm_silu_{name}"]
        launches.assert_traffic(partials, partials_work(*sizes, backward, "bf16", sums).bytes, *PARAMETERS)
        launches.assert_traffic(elementwise, elementwise_work(*sizes, backward, "bf16", each).bytes, *PARAMETERS)
        assert wide_share(partials, "x", "grad_y") == 1.0
        assert wide_share(elementwise, "x", "grad_y", "y", "grad_x") == 1.0


def wide_share(report, *tensors):
    """Share of the large tensors' bytes that move in 16-byte accesses."""
    large = sum(sum(report.per_tensor.get(name, {}).values()) for name in tensors)
    wide = sum(size for widths in report.traffic.values() for width, size in widths.items() if width >= 16)
    return min(1.0, wide / large)
