"""Compiles what a plan will launch into Triton's cache, on all cores, before the GPU is asked for anything.

    python -m tools.gpu.precompile CACHE [--plan correct] [--only layer_norm]

Needs no GPU: the launchers run on a pretended one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.runtime.jit import JITFunction

from . import pretend

Row = dict[str, str]
"""kernel, seconds, error ("" where it compiled)."""


def compile_all(
    specialisations: Mapping[str, JITFunction], cache: Path, target: str = "sm_90", processes: int | None = None
) -> list[Row]:
    """One row per specialisation, as pretend.Record has them; the code lies in `cache` afterwards."""
    jobs = list(specialisations.items())
    # Forked, so that kernels need not travel; nothing here has touched a GPU, or run threads.
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("fork"), _begin, (jobs, str(cache), target)) as pool:
        return list(pool.map(_compile, range(len(jobs))))


def failures(rows: Iterable[Row]) -> list[str]:
    return [f"{row['kernel']}: {row['error']}" for row in rows if row["error"]]


def _begin(jobs: list[tuple[str, JITFunction]], cache: str, target: str) -> None:
    global _jobs, _target
    _jobs, _target = jobs, target
    triton.knobs.cache.dir = cache


def _compile(number: int) -> Row:
    data, kernel = _jobs[number]
    began, error = time.perf_counter(), ""
    with pretend.driver(_target):
        try:
            kernel.preload(data)
        except Exception as reason:
            error = f"{type(reason).__name__}: {str(reason)[:300]}"
    return {"kernel": kernel.__name__, "seconds": f"{time.perf_counter() - began:.2f}", "error": error}
