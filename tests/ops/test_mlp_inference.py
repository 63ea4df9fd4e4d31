"""mlp's forward without gradients, on the Triton backend."""

import pytest
import torch

from ov3fast import ops, testing
from ov3fast.ops import triton

pytestmark = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")


def test_the_pre_activation_is_kept_for_a_backward_alone(monkeypatch):
    from ov3fast.kernels import mlp

    kept = []
    whole = mlp._forward
    monkeypatch.setattr(mlp, "_forward", lambda *args: (kept.append(args[-1] is not None), whole(*args))[1])
    x, w1, b1 = testing.make(3, 16), testing.make(24, 16, seed=1), testing.make(24, seed=2)
    w2, b2 = testing.make(8, 24, seed=3), testing.make(8, seed=4)
    values = [v.float() for v in (x, w1, b1, w2, b2)]
    plain = ops.mlp(*values, impl="triton")
    leaf = values[0].clone().requires_grad_()
    with_grad = ops.mlp(leaf, *values[1:], impl="triton")
    with torch.no_grad():
        without = ops.mlp(leaf, *values[1:], impl="triton")
    assert kept == [False, True, False]
    testing.assert_same_bits([plain, without], [with_grad.detach()] * 2)
    with_grad.sum().backward()
    assert leaf.grad is not None
