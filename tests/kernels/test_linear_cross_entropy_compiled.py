"""linear_cross_entropy's compiled kernel, executed: results, findings, order of programs, traffic."""

import pytest
import torch
from kernel_tools.launches import in_any_order, on_ptx

from ov3fast import testing
from ov3fast.kernels import linear_cross_entropy
from ov3fast.ops import _cross_entropy_eager as eager

DTYPES = [torch.bfloat16, torch.float16]


def inputs(classes, dtype):
    """hidden [7,24], weight [classes,24], labels with some ignored."""
    labels = torch.arange(7) * (classes // 7)
    labels[2::3] = -100
    return testing.make(7, 24, dtype=dtype), testing.make(classes, 24, seed=1, dtype=dtype), labels


@pytest.fixture(params=DTYPES, ids=str)
def values(request):
    """Of a call whose products are cuBLAS's."""
    return inputs(4173, request.param)


@pytest.fixture(params=DTYPES, ids=str)
def small(request):
    """Of a call whose products are ours. hidden's ignored rows are NaN; between its rows is a gap."""
    hidden, weight, labels = inputs(131, request.param)
    hidden = torch.cat([hidden, hidden], 1)[:, :24]
    hidden[labels == -100] = torch.nan
    return hidden, weight, labels


@pytest.fixture
def chunks(monkeypatch):
    """Three rows at a time."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 3 * 2 * 4173)


def wide(values):
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def check(ours, reference, arguments):
    testing.Budget(lambda values: reference(*values), arguments).check(ours)


def kernels(reports):
    return [report.kernel for report in reports]


def check_traffic(reports, dtype, passes):
    reports = [report for report in reports if report.kernel == "cross_entropy_rows"]
    for report, rows in zip(reports, (3, 3, 1), strict=True):
        beside = sum(report.per_tensor["logits"].values()) - passes * rows * 4173 * dtype.itemsize
        # The label's logit: all lanes read it from one address, one writes its gradient.
        assert 0 <= beside <= rows * (256 + 1) * dtype.itemsize


def test_forward(values, chunks, target):
    arguments = (*values, -100)
    ours, reports = in_any_order(linear_cross_entropy.forward, *arguments, target=target)
    check(ours, eager.forward, arguments)
    check_traffic(reports, values[0].dtype, 1)


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
    check_traffic(reports, values[0].dtype, 3)
    for report, rows in zip(reports[1:-1], (3, 3, 1), strict=True):
        counted = 2 if rows == 3 else 1
        assert report.per_tensor["copy"] == {"st": rows * 24 * 2} and report.per_tensor["hidden"] == {"ld": counted * 24 * 2}


def test_total_without_gradients(values, chunks, target):
    arguments = (*values, -100, True, False, False)
    ours, reports = in_any_order(linear_cross_entropy.total, *arguments, target=target)
    check(ours, eager.total, arguments)
    check_traffic(reports, values[0].dtype, 1)
    assert not any("lse" in report.per_tensor for report in reports)


def test_small_forward(small, target):
    hidden, weight, labels = small
    arguments = (hidden.nan_to_num(), weight, labels, -100)
    ours, reports = in_any_order(linear_cross_entropy.forward, *arguments, target=target)
    check(ours, eager.forward, arguments)
    assert kernels(reports) == ["cross_entropy_labels", "_linear", "cross_entropy_rows"]


def test_small_backward(small, target):
    _, lse = eager.forward(*wide((*small, -100)))
    arguments = (testing.make(7, seed=2, dtype=torch.float32), *small, lse.float(), -100, True, True)
    ours, reports = in_any_order(linear_cross_entropy.backward, *arguments, target=target)
    check(ours, eager.backward, arguments)
    assert kernels(reports) == ["_linear", "cross_entropy_rows", "_linear_gradients"]


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("mean", [True, False])
def test_small_total(small, mean, needs, target):
    arguments = (*small, -100, mean, *needs)
    ours, reports = in_any_order(linear_cross_entropy.total, *arguments, target=target)
    check(ours, eager.total, arguments)
    gradients = ["_linear_gradients"] if any(needs) else []
    assert kernels(reports) == ["cross_entropy_labels", "_linear", "cross_entropy_rows", *gradients, "cross_entropy_loss"]


@pytest.mark.parametrize("count", [1, 4096, 5000])
def test_loss(count):
    nll, factor, loss = testing.make(count, dtype=torch.float32), torch.tensor(0.3), torch.full((), torch.nan)
    with on_ptx() as launched:
        linear_cross_entropy.cross_entropy_loss[(1,)](nll, factor, loss, count, BLOCK=4096)
    testing.assert_within_budget(loss, nll.sum() * factor, nll.double().sum() * factor.double())
    [(_, report)] = launched
    assert report.per_tensor["nll"] == {"ld": 4 * count}


@pytest.mark.parametrize("sizes", [((7, 32), (173, 32)), ((0,), (500, 24)), ((341, 24), (0,)), ((0,), (0,)), ((1, 1), (1, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale(dtype, sizes, target):
    grads = tuple(testing.make(*size, seed=n, dtype=dtype) for n, size in enumerate(sizes))
    arguments = (torch.tensor(-1.7), *grads)
    ours, reports = in_any_order(linear_cross_entropy.scale, *arguments, target=target)
    check(ours, eager.scale, arguments)
    assert [grad.shape for grad in ours] == [grad.shape for grad in grads]
    count = sum(grad.numel() for grad in grads)
    assert len(reports) == (count > 0)
    for report in reports:
        moved = sum(sum(kinds.values()) for name, kinds in report.per_tensor.items() if name != "upstream")
        assert moved == 2 * count * dtype.itemsize
        assert any(grad.numel() % 16 for grad in grads) or report.share16() > 0.9


def test_wide_accesses():
    hidden, weight = testing.make(2, 8, dtype=torch.bfloat16), testing.make(16384, 8, dtype=torch.bfloat16)
    with on_ptx() as launched:
        linear_cross_entropy.total(hidden, weight, torch.tensor([3, 16000]), -100, True, True, False)
    [report] = [report for kernel, report in launched if kernel == "cross_entropy_rows"]
    # The rest are the label and the factor, which all lanes read.
    assert report.share16() > 0.85


@pytest.mark.parametrize("count", [0, 1, 4096, 5000])
@pytest.mark.parametrize("wrong", [None, -1, 50])
def test_labels(count, wrong, target):
    labels = torch.arange(count) % 50
    labels[::3] = -100
    if wrong is not None and count > 1:
        labels[count - 1] = wrong
    factor, fine = torch.full((), -1.0), torch.full((), -1)
    for mean, expected in ((True, 1 / max((labels != -100).sum().item(), 1)), (False, 1)):
        with on_ptx(target=target):
            linear_cross_entropy.cross_entropy_labels[(1,)](labels, factor, fine, count, 50, -100, MEAN=mean, BLOCK=4096)
        assert factor == torch.tensor(expected) and fine == (wrong is None or count <= 1)


def test_no_rows():
    hidden, weight, labels = torch.empty(0, 24), testing.make(16, 24).float(), torch.empty(0, dtype=torch.int64)
    with on_ptx():
        loss, grad_hidden, grad_weight = linear_cross_entropy.total(hidden, weight, labels, -100, True, True, True)
    assert loss == 0 and grad_hidden.shape == hidden.shape and torch.equal(grad_weight, torch.zeros_like(weight))
