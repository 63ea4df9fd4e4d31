"""Runs a kernel file's own launchers on CPU tensors: within `compiled()`, kernel[grid](...) executes the kernel's PTX by ptxrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ptxrun
from triton.runtime.jit import JITFunction

ORDERS = ("forward", "reversed", "shuffled")


@contextmanager
def compiled(order: str = "forward", target: str = "sm_80", **options) -> Iterator[dict[str, list]]:
    """Gives kernel -> reports of its launches; a finding of any kind fails at once."""
    reports: dict[str, list] = {}

    def run(kernel, *args, grid, warmup=False, num_warps=4, num_stages=2, **kwargs):
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        constexprs = {p.name: values.pop(p.name) for p in kernel.params if p.is_constexpr}
        report = ptxrun.run(
            kernel, grid, values, constexprs, target=target, num_warps=num_warps, num_stages=num_stages, order=order, **options
        )
        assert report.ok, report
        reports.setdefault(kernel.__name__, []).append(report)

    before, JITFunction.run = JITFunction.run, run
    try:
        yield reports
    finally:
        JITFunction.run = before


def moved(report) -> int:
    """Bytes read and written."""
    return report.bytes_read() + report.bytes_written()


def assert_traffic(report, expected: float) -> None:
    """Within 10 % of the formula."""
    assert abs(moved(report) - expected) <= 0.1 * expected, (
        f"{moved(report)} bytes moved, formula {expected:.0f}\n{report}\n{report.per_tensor}"
    )
