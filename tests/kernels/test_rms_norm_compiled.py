"""rms_norm's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools.launches import in_any_order

from ov3fast import testing
from ov3fast.kernels import rms_norm
from ov3fast.kernels.aot.cases.norm import RMS_NORM, backward_work, forward_work
from ov3fast.ops.rms_norm import _backward_eager, _forward_eager

DTYPE = torch.bfloat16
EPS = 1e-6


def tensors(rows, width, count):
    """Tensors [2, rows, width] whose leading axes are stored the other way round."""
    return [testing.transposed(testing.make(2, rows, width, seed=i).to(DTYPE)) for i in range(count)]


def check(ours, reference, arguments):
    testing.Budget(lambda values: reference(*values), arguments).check(ours)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("rows", "width"), [(5, 768), (3, 701)])
def test_forward(fused, rows, width, target):
    x, residual = tensors(rows, width, 2)
    arguments = (x, testing.make(width, seed=8).to(DTYPE), residual if fused else None, EPS)
    ours, [report] = in_any_order(rms_norm.forward, *arguments, target=target)
    check(ours, _forward_eager, arguments)
    if width % 16 == 0:
        work = forward_work(RMS_NORM, 2 * rows, width, 2, fused, -(-2 * rows // 4))
        assert report.bytes_read() + report.bytes_written() == pytest.approx(work.bytes, rel=0.1)
        assert report.share16() > 0.95


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("rows", "width"), [(11, 768), (9, 701)])
def test_backward(fused, rows, width, target):
    grad_y, h, grad_h = tensors(rows, width, 3)
    arguments = (grad_y, grad_h if fused else None, h, testing.make(width, seed=8).to(DTYPE), EPS, True, True)
    ours, [report, merge] = in_any_order(rms_norm.backward, *arguments, target=target)
    check(ours, _backward_eager, arguments)
    if width % 16 == 0:
        work = backward_work(RMS_NORM, 2 * rows, width, 2, fused, 2)
        assert report.bytes_read() + report.bytes_written() == pytest.approx(work.bytes, rel=0.1)
        assert report.share16() > 0.95
