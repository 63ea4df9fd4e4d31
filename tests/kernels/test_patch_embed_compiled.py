"""patch_embed's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools import launches

from ov3fast import testing
from ov3fast.kernels import patch_embed as kernels
from ov3fast.kernels.aot.cases import patch_embed as cases
from ov3fast.kernels.lib import config as configs
from ov3fast.ops import random, triton
from ov3fast.ops.patch_embed import reference

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="runs compiled code")
RNG = random.make_rng(7, 2**32 - 3)
SCALE, SHIFT = 0.36, 0.12
SMALL = "rng", "bias", "cls_token"


def inputs(batch, channels, height, width, patch, features, dtype):
    """Moments, weight, bias, pos_embed, cls_token, grad_y."""
    tokens = height // patch * (width // patch)
    values = (
        testing.make(batch, 2 * channels, height, width),
        testing.make(features, channels * patch**2, seed=1),
        testing.make(features, seed=2),
        testing.make(tokens + 1, features, seed=3),
        testing.make(features, seed=4),
        testing.make(batch, tokens + 1, features, seed=5),
    )
    return [v.to(dtype) for v in values]


def expected(*values, patch):
    *leaves, grad_y = (v.detach().requires_grad_() for v in values)
    y = reference(*leaves, patch_size=patch, scale=SCALE, shift=SHIFT, moments=True, rng=RNG)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.detach())]


def run(values, patch, order="forward", layout=torch.Tensor.contiguous, target="sm_80"):
    latents, weight, bias, pos_embed, cls_token, grad_y = (layout(v) for v in values)
    options = RNG, patch, SCALE, SHIFT, True
    with launches.compiled(order, target) as reports:
        y = kernels.forward(latents, weight, bias, pos_embed, cls_token, *options)
        grads = kernels.backward(grad_y, latents, weight, *options, True, True, True, True, True)
    return [y, *grads], reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "layout", "target"),
    [
        ((3, 16, 12, 8, 2, 72), "contiguous", "sm_80"),
        ((3, 16, 12, 8, 2, 72), "contiguous", "sm_90"),
        ((2, 5, 6, 10, 2, 33), "poisoned", "sm_80"),
        ((1, 9, 9, 6, 3, 17), "contiguous", "sm_80"),
    ],
)
def test_within_budget(dtype, sizes, layout, target):
    values, patch = inputs(*sizes, dtype), sizes[4]
    results, _ = run(values, patch, layout=testing.LAYOUTS[layout], target=target)
    testing.Budget(lambda values: expected(*values, patch=patch), values).check(
        results, ("y", "latents", "weight", "bias", "pos", "cls")
    )


def test_program_order_does_not_matter():
    values = inputs(3, 16, 12, 8, 2, 130, torch.bfloat16)
    results = [run(values, 2, order)[0] for order in launches.ORDERS]
    for other in results[1:]:
        testing.assert_same_bits(results[0], other)


def row(kernel):
    return configs.pick(f"patch_embed_{kernel}", "bf16")


def test_traffic():
    batch, channels, height, width, patch, features = sizes = 4, 16, 16, 16, 2, 128
    _, reports = run(inputs(*sizes, torch.bfloat16), patch)
    call = batch, height // patch * (width // patch), channels * patch**2, features
    launches.assert_traffic(
        reports["patch_embed_forward"][0], cases.forward_work(*call, 1, "bf16", row("forward")).bytes, *SMALL
    )
    launches.assert_traffic(
        reports["patch_embed_grad_latents"][0], cases.grad_latents_work(*call, "bf16", row("grad_latents")).bytes, *SMALL
    )
    launches.assert_traffic(
        reports["patch_embed_patches"][0], cases.patches_work(*call[:3], "bf16", row("patches")).bytes, *SMALL
    )
    launches.assert_traffic(
        reports["patch_embed_grad_weight"][0], cases.grad_weight_work(*call, "bf16", row("grad_weight")).bytes, *SMALL
    )
    for name in ("patch_embed_forward", "patch_embed_grad_latents", "patch_embed_grad_weight"):
        assert reports[name][0].mma_count > 0
