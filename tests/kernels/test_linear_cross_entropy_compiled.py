"""linear_cross_entropy's compiled kernel, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools.launches import in_any_order, on_ptx

from ov3fast import testing
from ov3fast.kernels import linear_cross_entropy
from ov3fast.ops import _cross_entropy_eager as eager

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def values(request):
    """hidden [7,24], weight [4173,24], labels with some ignored."""
    labels = torch.arange(7) * 600
    labels[2::3] = -100
    return testing.make(7, 24, dtype=request.param), testing.make(4173, 24, seed=1, dtype=request.param), labels


@pytest.fixture
def chunks(monkeypatch):
    """Three rows at a time."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 3 * 2 * 4173)


def wide(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def check(ours, reference, arguments):
    testing.Budget(lambda values: reference(*values), arguments).check(ours)


def check_traffic(reports, dtype, passes):
    for report, rows in zip(reports, (3, 3, 1), strict=True):
        beside = sum(report.per_tensor["logits"].values()) - passes * rows * 4173 * dtype.itemsize
        # The label's logit: all lanes read it from one address, one writes its gradient.
        assert 0 <= beside <= rows * (256 + 1) * dtype.itemsize


def test_forward(values, chunks, target):
    arguments = (*values, -100)
    ours, reports = in_any_order(linear_cross_entropy.forward, *arguments, target=target)
    check(ours, eager.forward, arguments)
    check_traffic(reports[1:], values[0].dtype, 1)


def test_backward(values, chunks, target):
    _, lse = eager.forward(*wide((*values, -100)))
    arguments = (testing.make(7, seed=2, dtype=torch.float32), *values, lse.float(), -100, True, True)
    ours, reports = in_any_order(linear_cross_entropy.backward, *arguments, target=target)
    check(ours, eager.backward, arguments)
    check_traffic(reports, values[0].dtype, 2)


def test_total(values, chunks, target):
    arguments = (*values, -100, True, True, True)
    ours, reports = in_any_order(linear_cross_entropy.total, *arguments, target=target)
    check(ours, eager.total, arguments)
    check_traffic(reports[1:], values[0].dtype, 3)


def test_wide_accesses():
    hidden, weight = testing.make(2, 8, dtype=torch.bfloat16), testing.make(16384, 8, dtype=torch.bfloat16)
    with on_ptx() as launched:
        linear_cross_entropy.total(hidden, weight, torch.tensor([3, 16000]), -100, True, True, False)
    [_, (_, report), *_] = launched
    # The rest are the label and the factor, which all lanes read.
    assert report.share16() > 0.85


@pytest.mark.parametrize("count", [0, 1, 4096, 5000])
@pytest.mark.parametrize("wrong", [None, -1, 50])
def test_labels(count, wrong, target):
    labels = torch.arange(count) % 50
    labels[::3] = -100
    if wrong is not None and count > 1:
        labels[count - 1] = wrong
    factor, fine = torch.full((), -1.0), torch.full((), -1, dtype=torch.int8)
    for mean, expected in ((True, 1 / max((labels != -100).sum().item(), 1)), (False, 1)):
        with on_ptx(target=target):
            linear_cross_entropy.cross_entropy_labels[(1,)](labels, factor, fine, count, 50, -100, MEAN=mean, BLOCK=4096)
        assert factor == torch.tensor(expected) and fine == (wrong is None or count <= 1)
