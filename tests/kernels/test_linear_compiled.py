"""linear's compiled kernels, executed: results, findings, order of programs, traffic; and sums over rows."""

import pytest
import torch
from kernel_tools.launches import in_any_order, on_ptx

from ov3fast import testing
from ov3fast.kernels import linear
from ov3fast.kernels.aot.cases.linear import work as linear_work
from ov3fast.kernels.aot.cases.reduce import merge_work, partials_work
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib import gemm
from ov3fast.kernels.lib.reduce import column_sums, strips_of
from ov3fast.kernels.lib.rows import rows
from ov3fast.ops.linear import _backward_eager, _forward_eager

DTYPES = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize(
    ("size", "mixed", "shape"),
    [
        ("large", False, (2, 70, 40, 136)),
        ("small", True, (2, 70, 40, 72)),
        ("small", False, (1, 3, 1, 1)),
        ("small", True, (1, 1, 5, 3)),
    ],
)
def test_ragged(monkeypatch, dtype, size, mixed, shape, target):
    """Forward and backward by our products alone; sizes of 1 become constants in the compiled code."""
    monkeypatch.setattr(gemm, "size_class", lambda *_: size)
    monkeypatch.setattr(gemm, "cublas_is_better", lambda *_: False)
    monkeypatch.setattr(gemm, "is_small", lambda *_: size == "small")
    batch, count, depth, columns = shape
    x = testing.transposed(testing.make(batch, count, depth).to(dtype))
    parameters = testing.make(columns, depth, seed=1, scale=0.3), testing.make(columns, seed=2)
    weight, bias = (p.to(torch.float32 if mixed else dtype) for p in parameters)
    grad_y = testing.transposed(testing.make(batch, count, columns, seed=3).to(dtype))
    forward, backward = (x, weight, bias), (grad_y, x, weight, True, True, True)
    ours, reports = in_any_order(lambda: [linear.forward(*forward), *linear.backward(*backward)], target=target)
    assert sum(report.mma_count > 0 for report in reports) == 2
    testing.Budget(lambda values: [_forward_eager(*values)], forward).check(ours[:1])
    testing.Budget(lambda values: _backward_eager(*values), backward).check(ours[1:])


@dtypes
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("transposed", [True, False])
def test_traffic(dtype, mixed, transposed):
    count, depth, columns = 128, 128, 192
    x = testing.make(count, depth).to(dtype)
    weight = testing.make(columns, depth, seed=1).to(torch.float32 if mixed else dtype)
    with on_ptx() as launched:
        linear._product(rows(x), weight if transposed else weight.t().contiguous(), None, columns, transposed)
    [(_, report), *_] = launched
    config = configs.pick("linear", "bf16", "small")
    expected = linear_work(count, columns, depth, 2, weight.itemsize, config).bytes - count // 64 * columns * weight.itemsize
    assert report.bytes_read() + report.bytes_written() == pytest.approx(expected, rel=0.1)
    assert report.share16() > 0.95


@dtypes
@pytest.mark.parametrize("width", [256, 131])
def test_column_sums(dtype, width):
    count = 35
    x = testing.make(count, width).to(dtype)
    [ours], [partials, merge] = in_any_order(lambda: [column_sums(rows(x), torch.float32)])
    testing.assert_within_budget(ours, x.sum(0, dtype=torch.float32), x.double().sum(0))
    if width % 16 == 0:
        for report, work in (
            (partials, partials_work(count, width, 2, configs.pick("column_partials", "bf16"))),
            (merge, merge_work(1, strips_of(count)[0], width, 4, configs.pick("column_merge", "fp32"))),
        ):
            assert report.bytes_read() + report.bytes_written() == pytest.approx(work.bytes, rel=0.1)
        assert partials.share16("ld") == merge.share16("ld") == 1
