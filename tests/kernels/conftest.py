"""`on_ptx`: launches of Triton kernels within the block execute their compiled PTX over CPU tensors, checked access by access."""

from contextlib import contextmanager

import pytest


@contextmanager
def _on_ptx(order="forward", target="sm_80"):
    """Yields the list of reports, one per launch in order; programs run "forward", "reversed" or "shuffled"."""
    ptxrun = pytest.importorskip("ptxrun")
    from triton.runtime.jit import JITFunction

    reports = []

    def execute(kernel, *args, grid, warmup, num_warps, num_stages, **named):
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        constants = {p.name: values.pop(p.name) for p in kernel.params if p.is_constexpr and p.name in values}
        report = ptxrun.run(kernel, grid, values, constants, target, num_warps, num_stages, order=order)
        assert report.ok, report
        reports.append(report)

    before, JITFunction.run = JITFunction.run, execute
    try:
        yield reports
    finally:
        JITFunction.run = before


@pytest.fixture
def on_ptx():
    return _on_ptx


@pytest.fixture
def in_any_order(on_ptx):
    """Calls a function on compiled kernels with programs in three orders; returns its tensors and the reports of the first."""
    from ov3fast import testing

    def call(function, *args):
        with on_ptx() as reports:
            expected = function(*args)
        for order in ("reversed", "shuffled"):
            with on_ptx(order):
                testing.assert_same_bits(function(*args), expected)
        return expected, reports

    return call
