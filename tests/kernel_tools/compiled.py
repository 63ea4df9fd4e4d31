"""Launches of Triton kernels that execute their compiled PTX over CPU tensors, checked access by access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ptxrun
from torch import Tensor

from ov3fast import testing


@contextmanager
def on_ptx(order: str = "forward", target: str = "sm_80") -> Iterator[list[ptxrun.report.Report]]:
    """Yields the list of reports, one per launch within the block; programs run "forward", "reversed" or "shuffled"."""
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


def in_any_order(function: Callable[..., Sequence[Tensor]], *args: Any) -> tuple[Sequence[Tensor], list[ptxrun.report.Report]]:
    """The function's tensors, the same bits in three orders of programs, and the reports of the first."""
    with on_ptx() as reports:
        expected = function(*args)
    for order in ("reversed", "shuffled"):
        with on_ptx(order):
            testing.assert_same_bits(function(*args), expected)
    return expected, reports
