"""Runs the real launchers on CPU tensors: kernel[grid](...) executes the kernel's PTX in ptxrun, which checks every access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ptxrun
from torch import Tensor
from triton.runtime.jit import JITFunction

from ov3fast import testing
from ov3fast.kernels.lib import config as configs

TARGETS = ("sm_80", "sm_90")
ORDERS = ("forward", "reversed", "shuffled")
Report = ptxrun.report.Report


@contextmanager
def on_ptx(order: str = "forward", target: str = "sm_80", **options: Any) -> Iterator[list[tuple[str, Report]]]:
    """Yields (kernel, report) of each launch in the block, using the target's configurations; any finding fails immediately."""
    launched = []

    def run(kernel, *args, grid, warmup=False, num_warps=4, num_stages=2, **kwargs):
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        constexprs = {p.name: values.pop(p.name) for p in kernel.params if p.is_constexpr and p.name in values}
        report = ptxrun.run(kernel, grid, values, constexprs, target, num_warps, num_stages, order=order, **options)
        assert report.ok, report
        launched.append((kernel.__name__, report))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(configs, "current_architecture", lambda: target):
        yield launched


@contextmanager
def compiled(order: str = "forward", target: str = "sm_80", **options: Any) -> Iterator[dict[str, list[Report]]]:
    """The same, grouped by kernel; filled when the block ends."""
    reports: dict[str, list[Report]] = {}
    with on_ptx(order, target, **options) as launched:
        yield reports
    for kernel, report in launched:
        reports.setdefault(kernel, []).append(report)


def in_any_order(
    function: Callable[..., Sequence[Tensor]], *args: Any, target: str = "sm_80"
) -> tuple[Sequence[Tensor], list[Report]]:
    """The function's tensors and the reports of its launches; on sm_80, asserts the same bits in three orders of programs."""
    first, *others = ORDERS if target == "sm_80" else ORDERS[:1]
    with on_ptx(first, target) as launched:
        expected = function(*args)
    for order in others:
        with on_ptx(order, target):
            testing.assert_same_bits(function(*args), expected)
    return expected, [report for _, report in launched]


def assert_traffic(report: Report, expected: float, *small: str) -> None:
    """Asserts that the bytes read and written are within 10 % of the formula; `small` are vectors that many threads reread from cache."""
    moved = sum(sum(kinds.values()) for name, kinds in report.per_tensor.items() if name not in small)
    assert abs(moved - expected) <= 0.1 * expected, (
        f"{moved} bytes moved, formula {expected:.0f}\n{report}\n{report.per_tensor}"
    )
