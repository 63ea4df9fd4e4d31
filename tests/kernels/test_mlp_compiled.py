"""mlp's compiled kernels, executed: results, findings, order of programs, traffic."""

from dataclasses import replace

import pytest
import torch
from kernel_tools.launches import assert_traffic, in_any_order, on_ptx

from ov3fast import testing
from ov3fast.kernels import mlp
from ov3fast.kernels.aot.cases.linear import gradients_work
from ov3fast.kernels.aot.cases.mlp import work
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib import gemm
from ov3fast.kernels.lib.common import cdiv
from ov3fast.kernels.lib.rows import rows as rows_of
from ov3fast.ops.mlp import _backward_eager, _forward_eager
from ov3fast.testing import assert_same_bits

CASES = [
    (torch.bfloat16, "large", "gelu", False),
    (torch.float16, "large", "gelu_tanh", False),
    (torch.bfloat16, "small", "gelu_tanh", True),
    (torch.float16, "small", "gelu", True),
]
cases = pytest.mark.parametrize(("dtype", "size", "activation", "mixed"), CASES)
RAGGED, WHOLE = (2, 70, 40, 136, 24), (2, 128, 64, 256, 64)
shapes = pytest.mark.parametrize("shape", [RAGGED, WHOLE], ids=["ragged", "whole"])


def inputs(dtype, mixed, batch, rows, width, hidden, features):
    """x, w1, b1, w2, b2, dy; x and dy with their leading axes stored the other way round."""
    x = testing.transposed(testing.make(batch, rows, width).to(dtype))
    parameters = [
        testing.make(hidden, width, seed=1, scale=0.3),
        testing.make(hidden, seed=2),
        testing.make(features, hidden, seed=3, scale=0.3),
        testing.make(features, seed=4),
    ]
    parameters = [p.to(torch.float32 if mixed else dtype) for p in parameters]
    return x, *parameters, testing.transposed(testing.make(batch, rows, features, seed=5).to(dtype))


def check(ours, reference, arguments):
    testing.Budget(lambda values: reference(*values), arguments).check(ours)


def check_traffic(report, work, target):
    assert_traffic(report, work.bytes, "b1")
    assert report.mma_count > 0
    # On sm_90 every thread reads the bias of its columns, from the cache.
    assert report.share16() > (0.9 if target == "sm_80" else 0.8)


@cases
@shapes
def test_forward(monkeypatch, dtype, size, activation, mixed, shape, target):
    monkeypatch.setattr(gemm, "size_class", lambda *_: size)
    monkeypatch.setattr(gemm, "is_small", lambda *_: size == "small")
    x, w1, b1, w2, b2, _ = inputs(dtype, mixed, *shape)
    arguments = x, w1, b1, w2, b2, activation
    ours, reports = in_any_order(mlp.forward, *arguments, target=target)
    check(ours, _forward_eager, arguments)
    if shape == WHOLE:
        batch, rows, width, hidden, _ = shape
        config = configs.pick("mlp_forward", "bf16", size)
        check_traffic(reports[0], work(batch * rows, hidden, width, 2, w1.itemsize, config, False), target)


@cases
@shapes
def test_backward(monkeypatch, dtype, size, activation, mixed, shape, target):
    monkeypatch.setattr(gemm, "size_class", lambda *_: size)
    monkeypatch.setattr(gemm, "is_small", lambda *_: size == "small")
    x, w1, b1, w2, b2, grad_y = inputs(dtype, mixed, *shape)
    h = torch.nn.functional.linear(x, w1.to(dtype), b1.to(dtype))
    arguments = grad_y, x, h, w1, w2, activation, True, True, True, True, True
    ours, reports = in_any_order(mlp.backward, *arguments, target=target)
    arguments = grad_y, x, h, w1, b1, w2, *arguments[5:]
    check(ours, _backward_eager, arguments)
    if shape == WHOLE:
        batch, rows, _, hidden, features = shape
        config = configs.pick("mlp_backward", "bf16", size)
        # The sums of a small call's biases come from its second launch.
        partials = cdiv(batch * rows, config.blocks["BLOCK_M"]) * hidden * 4 if size == "small" else 0
        expected = work(batch * rows, hidden, features, 2, w2.itemsize, config, True)
        check_traffic(reports[0], replace(expected, bytes=expected.bytes - partials), target)
        if size == "small":
            config = configs.pick("mlp_gradients", "bf16", architecture=target)
            assert len(reports) == 2
            layers = [(x.shape[-1], hidden, True), (hidden, features, False)]
            check_traffic(reports[1], gradients_work(batch * rows, layers, 2, w1.itemsize, config), target)


@pytest.mark.parametrize(
    "needs", [(True, False, False, False, False), (False, False, True, False, True), (False, True, False, True, False)]
)
def test_part_of_the_gradients_of_a_small_call(needs, target):
    """The same bits as of all together, and nothing written for the others."""
    x, w1, b1, w2, _, grad_y = inputs(torch.bfloat16, False, *RAGGED)
    arguments = grad_y, x, torch.nn.functional.linear(x, w1, b1), w1, w2, "gelu"
    with on_ptx(target=target):
        whole = mlp.backward(*arguments, *[True] * 5)
        part = mlp.backward(*arguments, *needs)
    for found, expected, need in zip(part, whole, needs, strict=True):
        assert_same_bits([found], [expected]) if need else None
        assert need or found.numel() == 0


def test_inference_writes_no_pre_activation(monkeypatch):
    monkeypatch.setattr(gemm, "size_class", lambda *_: "large")
    x, w1, b1, w2, b2, _ = inputs(torch.bfloat16, False, *WHOLE)
    with on_ptx() as kept:
        expected, _ = mlp.forward(x, w1, b1, w2, b2, "gelu")
    with on_ptx() as launched:
        y, h = mlp.inference(x, w1, b1, w2, b2, "gelu")
    assert_same_bits([y], [expected])
    assert h.numel() == 0
    (_, with_h), (_, without) = kept[0], launched[0]
    assert with_h.bytes_written() == 2 * without.bytes_written()


def test_calls_are_small_by_size_alone():
    def small(count, width, hidden, features, dtype=torch.bfloat16):
        return mlp.is_small(rows_of(torch.empty(count, width, dtype=dtype)), hidden, features)

    assert small(512, 384, 1536, 384) and not small(1024, 384, 1536, 384)
    assert not small(512, 384, 1536, 384, torch.float32) and small(64, 384, 1536, 384, torch.float32)
    assert not small(2049, 8, 8, 8) and not small(8, 8, 4096, 8)
    assert not any(small(*sizes) for sizes in ((0, 8, 8, 8), (8, 0, 8, 8), (8, 8, 0, 8), (8, 8, 8, 0)))
