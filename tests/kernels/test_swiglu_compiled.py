"""swiglu's compiled kernels, executed: results, findings, order of programs, traffic."""

import pytest
from kernel_tools.launches import in_any_order

from ov3fast import testing
from ov3fast.kernels import swiglu
from ov3fast.ops.swiglu import _backward_eager, reference

SIZES = [(5, 528), (3, 37)]


def tensors(rows, hidden):
    x, grad_y = (testing.make(2, rows, width, seed=width).bfloat16() for width in (2 * hidden, hidden))
    return testing.transposed(x), testing.transposed(grad_y)


def check(ours, formula, arguments):
    testing.Budget(lambda values: [formula(*values)], arguments).check([ours])


@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_forward(rows, hidden, target):
    x, _ = tensors(rows, hidden)
    ours, [report] = in_any_order(swiglu.forward, x, target=target)
    check(ours, reference, (x,))
    if hidden % 16 == 0:
        assert report.bytes_read() + report.bytes_written() == 3 * x.nbytes // 2
        assert report.share16() == 1


@pytest.mark.parametrize(("rows", "hidden"), SIZES)
def test_backward(rows, hidden, target):
    x, grad_y = tensors(rows, hidden)
    ours, [report] = in_any_order(swiglu.backward, grad_y, x, True, target=target)
    check(ours, _backward_eager, (grad_y, x, True))
    if hidden % 16 == 0:
        assert report.bytes_read() + report.bytes_written() == 5 * x.nbytes // 2
        assert report.share16() == 1
