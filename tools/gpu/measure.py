"""Times one operator: python -m tools.gpu.measure ROWS OPERATOR [--compile].

ms is the median over replays of a captured graph, each with a cold cache: pure GPU time. host_us is the median time of the
call in Python, including launches but no synchronisation. Ours runs by automatic choice ("ov3fast") and by name. --compile measures only
torch.compile's variants, which take longest to compile.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benches import cases, timing
from ov3fast import ops

from .rows import Rows
from .setting import BACKENDS, DEVICE, REHEARSAL, capture, doing, synchronize

TURNS, SECONDS = (1, 0.0) if REHEARSAL else (25, 1.0)


def variants(case: cases.Case, compiles: bool) -> Iterator[tuple[str, str | None, Callable[[], object]]]:
    """(name, forced backend or None, call)."""
    for name, call in case.variants.items():
        if (name == "compile") == compiles:
            yield name, None, call
            if name == cases.OURS:
                there = ops.table().get(case.operator, BACKENDS)
                yield from ((backend, backend, call) for backend in BACKENDS if backend in there)


def measured(call: Callable[[], object], compiles: bool) -> dict[str, Any]:
    """ms, its quartiles, host_us, and whether a graph was captured; if it can't be, ms is the time of calls, including Python's."""
    call()
    synchronize()
    host = []
    # Without the default device, which is a mode and costs each call into torch from Python some microseconds. torch.compile would compile anew without it.
    with nullcontext() if compiles else torch._C.DisableTorchFunction():
        for _ in range(TURNS):
            began = time.perf_counter()
            call()
            host.append(time.perf_counter() - began)
            synchronize()
    run, how = call, {"captured": False}
    if not REHEARSAL:
        try:
            graph, _ = capture(call)
            run, how = graph.replay, {"captured": True}
        except Exception as reason:
            if isinstance(reason, torch.AcceleratorError) and "capture" not in str(reason).lower():
                raise
            how["detail"] = f"not captured: {reason}"
            synchronize()
    times = timing.interleaved({"": run}, budget=SECONDS, least=TURNS, most=4 * TURNS)[""]
    first, median, third = (1e3 * seconds for seconds in timing.quartiles(times))
    host_us = round(1e6 * statistics.median(host), 1)
    return {"ms": round(median, 5), "ms_q1": round(first, 5), "ms_q3": round(third, 5), "host_us": host_us, **how}


def measure(case: cases.Case, compiles: bool, rows: Rows) -> None:
    where = dict(direction=case.direction, dtype=case.dtype, size=case.shape)
    work = {"flops": case.flops, "bytes": case.bytes, "target": case.target}
    for name, forced, call in variants(case, compiles):
        doing(operator=case.operator, variant=name, **where)
        try:
            with ops.use(forced) if forced else nullcontext():
                rows.write(case.operator, "time", **where, variant=name, **work, **measured(call, compiles))
        except Exception as reason:
            ours = name == cases.OURS or forced
            # A backend need not support every call, nor a peer every shape.
            status = "failed" if ours and "can't run this call" not in str(reason) else "left out"
            rows.write(case.operator, "time", status, **where, variant=name, detail=traceback.format_exc(limit=-3))
            if isinstance(reason, torch.AcceleratorError):
                raise


def rates(rows: Rows) -> None:
    """The machine's peak rates, for the table's rooflines."""
    for dtype, kind in cases.DTYPES.items():
        doing(operator="machine", check="rate", dtype=dtype)
        rows.write("machine", "rate", dtype=dtype, size="product", rate=timing.gemm_rate(kind))
    rows.write("machine", "rate", size="copy", rate=timing.copy_rate())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("operator", help='of the operator table; or "machine", for its rates')
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = Rows(options.rows)
    with torch.device(DEVICE):
        if options.operator == "machine":
            rates(rows)
            return
        for case in cases.table(options.operator, makers=cases.tiny() if REHEARSAL else None):
            measure(case, options.compile, rows)


if __name__ == "__main__":
    main()
