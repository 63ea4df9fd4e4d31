"""rope's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools.launches import in_any_order

from ov3fast import testing
from ov3fast.kernels import rope
from ov3fast.ops.rope import _backward_eager, angles, reference

EPS = 1e-6
SIZES = [(2, 5, 2, 64), (2, 3, 1, 72)]


def tensors(batch, tokens, heads, width):
    qkv, grad = (testing.transposed(testing.make(batch, tokens, 3, heads, width, seed=i).bfloat16()) for i in (0, 1))
    weights = [testing.make(width, seed=i).bfloat16() for i in (2, 3)]
    return qkv, grad, angles(tokens, width, torch.device("cpu"), torch.float32), weights


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(norm, size, target):
    qkv, _, tables, weights = tensors(*size)
    arguments = (qkv, *tables, *(weights if norm else (None, None)), EPS)
    ours, [report] = in_any_order(rope.forward, *arguments, target=target)
    testing.Budget(lambda values: [reference(*values)], arguments).check([ours])
    assert report.bytes_written() == qkv.nbytes


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward(norm, size, target):
    qkv, grad, tables, weights = tensors(*size)
    saved = (qkv, *weights) if norm else (None, None, None)
    arguments = (grad, *tables, *saved, EPS, True, norm, norm)
    ours, reports = in_any_order(rope.backward, *arguments, target=target)
    testing.Budget(lambda values: _backward_eager(*values), arguments).check(ours)
    assert len(reports) == (2 if norm else 1), "one pass, and the sum of the weights' gradients"
