"""The CUDA backend on CPU tensors: the PTX of csrc/cuda, executed by ptxrun with all its checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ptxrun

from ov3fast.ops import cuda

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


@contextmanager
def emulated(**options: Any) -> Iterator[list[tuple[cuda.Launch, ptxrun.report.Report]]]:
    """Within the block the operators use the CUDA backend for CPU tensors; any finding fails. Yields the launches so far.

    options: ptxrun.run_cuda's, such as order="reversed".
    """
    ran = []

    def execute(launch: cuda.Launch) -> None:
        arguments = [(n, ptxrun.Struct(*v.fields) if isinstance(v, cuda.Struct) else v) for n, v in launch.arguments]
        source = SOURCES / f"{launch.binary}.cu"
        report = ptxrun.run_cuda(source, launch.kernel, launch.grid, cuda.THREADS, arguments, flags=("-std=c++17",), **options)
        assert report.ok, report
        ran.append((launch, report))

    with cuda.executed_by(execute):
        yield ran


def moved(ran: Sequence[tuple[cuda.Launch, ptxrun.report.Report]], kernel: str) -> int:
    """Bytes read and written by launches of kernels whose name contains `kernel`."""
    return sum(report.bytes_read() + report.bytes_written() for launch, report in ran if kernel in launch.kernel)


def share16(ran: Sequence[tuple[cuda.Launch, ptxrun.report.Report]], kernel: str) -> float:
    """Minimum fraction of these bytes moved 16 at a time, over those launches."""
    return min(report.share16("ld", "st") for launch, report in ran if kernel in launch.kernel)
