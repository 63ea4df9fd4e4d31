"""Compiles everything that a plan will launch into Triton's cache, on all cores, before the GPU is used.

    python -m tools.gpu.precompile ROWS PLAN --cache FOLDER [--only layer_norm]

Needs no GPU: the launchers run on a pretended one. A launcher that fails there would fail on a GPU too and gets a row, as does a kernel that
does not compile.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from ov3fast import ops
from ov3fast.kernels.lib import config as configs

from . import pretend, setting
from .rows import Rows

Compiled = dict[str, str]
"""kernel, seconds, error ("" if it compiled)."""


def compile_all(
    specialisations: Mapping[str, JITFunction], cache: Path, target: str = "sm_90", processes: int | None = None
) -> list[Compiled]:
    """One row per specialisation in a pretend.Record; leaves the code in `cache`."""
    jobs = list(specialisations.items())
    # Forked, so that kernels need not be pickled; nothing here has touched a GPU or started threads.
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("fork"), _begin, (jobs, str(cache), target)) as pool:
        return list(pool.map(_compile, range(len(jobs))))


def failures(rows: Iterable[Compiled]) -> list[str]:
    return [f"{row['kernel']}: {row['error']}" for row in rows if row["error"]]


def _begin(jobs: list[tuple[str, JITFunction]], cache: str, target: str) -> None:
    global _jobs, _target
    _jobs, _target = jobs, target
    triton.knobs.cache.dir = cache


def _compile(number: int) -> Compiled:
    data, kernel = _jobs[number]
    began, error = time.perf_counter(), ""
    with pretend.driver(_target):
        try:
            kernel.preload(data)
        except Exception as reason:
            error = f"{type(reason).__name__}: {str(reason)[:300]}"
    return {"kernel": kernel.__name__, "seconds": f"{time.perf_counter() - began:.2f}", "error": error}


def collect(plan: str, only: str, target: str, rows: Rows, sizes: Iterable[str]) -> pretend.Record:
    """Everything the plan launches: the samples in all dtypes, or the cases of the operator table."""
    with pretend.gpu(target) as record, ops.use("triton"):
        for name, call in CALLS[plan](only, sizes):
            try:
                call()
            except Exception as reason:
                rows.write(name, "launcher on a pretended GPU", "failed", detail=f"{type(reason).__name__}: {reason}")
    return record


def _tried(only: str, sizes: Iterable[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    module = setting.samples()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for size in sizes:
            for sample in module.with_backend("triton", dtype):
                if only in sample.op:
                    yield sample.name, lambda sample=sample, size=size, dtype=dtype: sample.results(sample.inputs(size, dtype))
    for sample in module.ACROSS_CHUNKS:
        if only in sample.op and "real" in sizes:
            yield sample.name, lambda sample=sample: sample.results(sample.inputs("real", torch.bfloat16))


def _timed(only: str, sizes: Iterable[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    from benches import cases

    # trunc_normal_ resamples until all values are within bounds, which never ends on fake tensors; and fake parameters can't be cast in place.
    with mock.patch.object(torch.nn.init, "trunc_normal_"), mock.patch.object(torch.nn.Module, "to", _with_new_parameters):
        for case in cases.table(only, makers=cases.full(on_gpu=True) if "real" in sizes else cases.tiny()):
            # Operators without Triton kernels would run other kernels on invalid addresses.
            if "triton" in ops.table().get(case.operator, ("triton",)):
                yield case.operator, case.variants[cases.OURS]


def _diagnosed(only: str, sizes: Iterable[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that the sanitizer runs, and the configurations to be tuned."""
    from benches import cases

    from . import plans

    yield from _tried(only, ["tiny"])
    makers = cases.full(on_gpu=True) if "real" in sizes else cases.tiny()
    for case in cases.table(only, dtype="bf16", makers=[maker for maker in makers if maker[0] in plans.TUNED]):
        yield case.operator, functools.partial(_try_neighbours, case.variants[cases.OURS])


def _try_neighbours(call: Callable[[], object]) -> None:
    from . import tuning

    for key, _, other in tuning.trials(call):
        with configs.trying({key: other}):
            call()


CALLS = {"correct": _tried, "time": _timed, "diagnose": _diagnosed}


def _with_new_parameters(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(parameter.detach().to(dtype)))
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("plan")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "real"])
    parser.add_argument("--target", default="sm_90")
    options = parser.parse_args()
    rows, began = Rows(options.rows), time.monotonic()
    record = collect(options.plan, options.only, options.target, rows, options.sizes)
    compiled = compile_all(record.specialisations, options.cache, options.target)
    for row in compiled:
        if row["error"]:
            rows.write(row["kernel"], "compile", "failed", detail=row["error"])
    seconds = round(time.monotonic() - began, 1)
    rows.write("all", "precompile", kernels=len(compiled), seconds=seconds, launches=len(record.launches))


if __name__ == "__main__":
    main()
