"""layer_norm's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools.launches import in_any_order

from ov3fast import testing
from ov3fast.kernels import layer_norm
from ov3fast.kernels.aot.cases.norm import LAYER_NORM, backward_work, forward_work
from ov3fast.ops.layer_norm import _backward_eager, _forward_eager

DTYPES = [torch.bfloat16, torch.float16]
EPS = 1e-6


def tensors(rows, width, dtype, count):
    """Tensors [2, rows, width] whose leading axes are stored the other way round."""
    return [testing.transposed(testing.make(2, rows, width, seed=i).to(dtype)) for i in range(count)]


def parameters(width, dtype):
    return testing.make(width, seed=8).to(dtype), testing.make(width, seed=9).to(dtype)


def wide(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


def check(ours, reference, arguments):
    testing.Budget(lambda values: reference(*values), arguments).check(ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("rows", "width"), [(5, 768), (3, 701)])
def test_forward(dtype, fused, rows, width, target):
    x, residual = tensors(rows, width, dtype, 2)
    arguments = (x, *parameters(width, dtype), residual if fused else None, EPS)
    ours, [report] = in_any_order(layer_norm.forward, *arguments, target=target)
    check(ours, _forward_eager, arguments)
    if width % 16 == 0:
        work = forward_work(LAYER_NORM, 2 * rows, width, 2, fused, -(-2 * rows // 4))
        assert report.bytes_read() + report.bytes_written() == pytest.approx(work.bytes, rel=0.1)
        assert report.share16() > 0.95


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("rows", "width"), [(11, 768), (9, 701)])
def test_backward(dtype, fused, rows, width, target):
    grad_y, h, grad_h = tensors(rows, width, dtype, 3)
    weight, bias = parameters(width, dtype)
    exact = _forward_eager(*wide((h, weight, bias, None, EPS)))
    mean, rstd = exact[2].float(), exact[3].float()
    arguments = (grad_y, grad_h if fused else None, h, weight, mean, rstd, True, True, True)
    ours, [report, merge] = in_any_order(layer_norm.backward, *arguments, target=target)
    check(ours, _backward_eager, arguments)
    if width % 16 == 0:
        work = backward_work(LAYER_NORM, 2 * rows, width, 2, fused, 2)
        # All lanes read their row's statistics from one address, which memory serves once; the report counts each lane.
        repeated = sum(report.per_tensor[name]["ld"] - report.footprint[name][0] for name in ("mean", "rstd"))
        moved = report.bytes_read() + report.bytes_written()
        assert moved - repeated == pytest.approx(work.bytes, rel=0.1)
        assert report.share16() * moved > 0.95 * (moved - repeated)
