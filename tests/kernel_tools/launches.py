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


def assert_traffic(report, expected: float, *small: str) -> None:
    """Bytes read and written are within 10 % of the formula; `small` are vectors that many threads read again, from the cache."""
    moved = sum(sum(kinds.values()) for name, kinds in report.per_tensor.items() if name not in small)
    assert abs(moved - expected) <= 0.1 * expected, (
        f"{moved} bytes moved, formula {expected:.0f}\n{report}\n{report.per_tensor}"
    )
