"""The AMX tile unit is bitwise equal to its model, on processors that have it."""

import pytest
import torch

from ov3fast import ops
from ov3fast.ops import cpu
from ov3fast.testing import make

BF16 = torch.bfloat16


def linear():
    return ops.linear, (make(70, 200, dtype=BF16), make(50, 200, dtype=BF16), make(50, dtype=BF16))


def mlp():
    sizes = (70, 40), (130, 40), (130,), (40, 130), (40,)
    return ops.mlp, tuple(make(*size, seed=i, dtype=BF16) for i, size in enumerate(sizes))


def attention():
    return ops.flash_attention, tuple(make(2, 77, 2, 72, seed=seed, dtype=BF16) for seed in range(3))


def contrastive_loss():
    features = (make(65, 72, seed=seed, dtype=BF16) for seed in range(2))
    return ops.contrastive_loss, (*features, torch.tensor(10.0))


def linear_cross_entropy():
    labels = torch.arange(65) % 97

    def loss(hidden, weight):
        return ops.linear_cross_entropy(hidden, weight, labels)

    return loss, (make(65, 72, dtype=BF16), make(97, 72, dtype=BF16))


def run(isa, function, inputs):
    inputs = [value.clone().requires_grad_() for value in inputs]
    with cpu.use_isa(isa):
        result = function(*inputs)
        return result.detach(), *torch.autograd.grad(result.float().square().sum(), inputs)


@pytest.mark.backend_independent
@pytest.mark.full
@pytest.mark.skipif("amx_bf16" not in cpu.available_isas(), reason="this processor has no tile unit")
@pytest.mark.skipif(cpu.EMULATED not in cpu.available_isas(), reason="csrc/build.py --emulated makes the model")
@pytest.mark.parametrize("case", [linear, mlp, attention, contrastive_loss, linear_cross_entropy])
def test_hardware_equals_its_model(case):
    function, inputs = case()
    for hardware, model in zip(run("amx_bf16", function, inputs), run(cpu.EMULATED, function, inputs), strict=True):
        assert torch.equal(hardware, model)
