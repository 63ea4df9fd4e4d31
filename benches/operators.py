"""The operator table: every operator against PyTorch's best alternative, on this machine.

    make bench                                            # writes benches/results/operators-cpu-CHIP.csv, and the choice of backends
    python -m benches.operators --only attention          # some rows, printed only
    ov3fast bench --device cuda                           # the same on a GPU, including installed libraries: operators-cuda.csv

Variants are interleaved in one process: the automatic choice, each backend that it could pick, and PyTorch's alternatives. A row has the
median and quartiles of the automatic choice, the backend that was `chosen`, the best peer and the speedup over it, GFLOP/s or GB/s, the fraction of the
roofline (FLOPs over the matrix-product rate or bytes over the copy rate, whichever is longer, both measured in the same run), the growth of the process
beyond the results, and the medians of all `backends` and `peers`. Rows where we lose stay in. Use a quiet machine.

benches/rule.py derives the choice of backends from this chip's file. If that changes a choice, the affected rows are measured again.
"""

from __future__ import annotations

import csv
import gc
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro

from ov3fast import ops
from ov3fast.cli.bench import BenchOptions
from ov3fast.io import atomic_write
from ov3fast.ops import _chip, _choice, _dispatch
from ov3fast.ops._trials import BACKENDS, FAR, OUT_OF_BOUNDS

from . import cases, rule, timing

RESULTS = Path(__file__).parent / "results"


def measure(case: cases.Case, budget: float, floors: dict[str, float]) -> dict[str, str]:
    """One row of the table."""
    forced = backends(case)
    once = {name: timing.once(run) for name, run in forced.items()}
    far = {name: seconds for name, seconds in once.items() if seconds > FAR * min(once.values())}
    near = {name: run for name, run in forced.items() if name not in far}
    taken = chosen(case)
    if taken in near:  # the automatic choice is this backend, so don't measure it twice
        del near[taken]
    seconds = timing.interleaved({**case.variants, **{f"impl {name}": run for name, run in near.items()}}, budget)
    first, median, third = timing.quartiles(seconds[cases.OURS])
    medians = {name: timing.quartiles(runs)[1] for name, runs in seconds.items()}
    peers = {name: medians[name] for name in case.variants if name != cases.OURS}
    impls = {name: medians[cases.OURS] if name == taken else medians.get(f"impl {name}") or far[name] for name in forced}
    best = min(peers, key=peers.get, default="")
    floor = max(case.flops / floors["bf16" if case.dtype == cases.MIXED else case.dtype], case.bytes / floors["copy"])
    row = {
        "operator": case.operator,
        "direction": case.direction,
        "shape": case.shape,
        "dtype": case.dtype,
        "ms": f"{1e3 * median:.3f}",
        "ms_q1": f"{1e3 * first:.3f}",
        "ms_q3": f"{1e3 * third:.3f}",
        "rate": _rate(case.flops / median) if case.flops else f"{case.bytes / median / 1e9:.1f} GB/s",
        "of_floor": f"{floor / median:.2f}",
        "best_peer": best,
        "peer_ms": f"{1e3 * peers[best]:.3f}" if best else "",
        "ratio": f"{peers[best] / median:.2f}" if best else "",
        "target": "" if case.target is None else f"{case.target:g}",
        "extra_mb": "",
        "peer_extra_mb": "",
        "chosen": taken,
        "size": "" if case.size is None else " ".join(map(str, case.size)),
        "backends": _list(impls),
        "peers": _list(peers),
    }
    if case.note_memory:
        for column, name in (("extra_mb", cases.OURS), ("peer_extra_mb", best)):
            used = timing.extra_memory(case.variants[name]) if name else None
            row[column] = "" if used is None else f"{max(0.0, used - case.result_bytes / 1e6):.0f}"
    return row


def _list(seconds: dict[str, float]) -> str:
    """In ms, fastest first."""
    return "; ".join(f"{name} {1e3 * value:.3f}" for name, value in sorted(seconds.items(), key=lambda item: item[1]))


def backends(case: cases.Case) -> dict[str, Callable[[], object]]:
    """The case on each backend that automatic selection could pick; empty if it is not a single operator, and on a GPU."""
    op = operator(case)
    if case.size is None or timing.device() != "cpu":
        return {}
    status = ops.table()[op]
    ready = [n for n in BACKENDS if status.get(n) == "ready" and (op, n) not in OUT_OF_BOUNDS]

    def forced(name: str) -> Callable[[], object]:
        def run() -> object:
            # ops.use takes some microseconds, which would count against this backend.
            before, _dispatch._override = _dispatch._override, name
            try:
                return case.variants[cases.OURS]()
            finally:
                _dispatch._override = before

        return run

    return {name: forced(name) for name in ready}


def operator(case: cases.Case) -> str:
    """The registered name of the case's operator."""
    op = case.operator.split()[0]
    return f"{op}_total" if (op, case.direction) == ("linear_cross_entropy", "both") else op


def chosen(case: cases.Case) -> str:
    """The automatically selected backend: one name, or "FORWARD + BACKWARD" if they differ."""
    taken: dict[bool, dict[str, None]] = {False: {}, True: {}}
    select = _dispatch.Selector.select_backend

    def watch(self: _dispatch.Selector, *call: Any) -> str:
        name = select(self, *call)
        taken[self.backward][name] = None
        return name

    _dispatch.forget_choices()
    with mock.patch.object(_dispatch.Selector, "select_backend", watch):
        case.variants[cases.OURS]()
    forward, backward = (", ".join(sorted(names)) for names in (taken[False], taken[True]))
    return f"{forward} + {backward}" if forward and backward and forward != backward else forward or backward


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.0f} GFLOP/s"


def measure_all(options: BenchOptions, table: Iterable[cases.Case], rows: list[dict[str, str]]) -> None:
    """Measures the cases, replaces their rows in `rows`, and writes the file."""
    from rich.console import Console

    console = Console()
    floors = {dtype: timing.gemm_rate(kind) for dtype, kind in cases.DTYPES.items()} | {"copy": timing.copy_rate()}
    console.print(
        f"floors: fp32 {floors['fp32'] / 1e9:.0f} GFLOP/s, bf16 {floors['bf16'] / 1e9:.0f} GFLOP/s, copy {floors['copy'] / 1e9:.1f} GB/s"
    )
    facts = timing.machine()
    for case in table:
        if not options.compile:
            case.variants.pop("compile", None)
        row = measure(case, options.budget, floors)
        row |= {f"{name}_rate": f"{rate:.3e}" for name, rate in floors.items()} | facts
        before = next((i for i, old in enumerate(rows) if _call(old) == _call(row)), len(rows))
        rows[before : before + 1] = [row]
        if options.out is not None:
            write(rows, options.out)
        console.print(
            f"{row['operator']:<24} {row['direction']:<9} {row['shape']:<34} {row['dtype']:<5} {row['ms']:>10} ms  {row['rate']:>12}"
            f"  {row['of_floor']:>5} of roofline  {row['ratio']:>6} x {row['best_peer']:<22} target {row['target']:<5}"
            f" {row['extra_mb'] and row['extra_mb'] + ' MB'}  {row['chosen']}: {row['backends']}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        del case
        torch.compiler.reset()  # peers at different shapes are the same function, which would fall back to eager after 8 recompilations
        gc.collect()


def _call(row: dict[str, str]) -> tuple[str, ...]:
    return row["operator"], row["direction"], row["shape"], row["dtype"]


def write(rows: list[dict[str, str]], path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def markdown(path: Path) -> str:
    """The results as a Markdown table."""
    lines = [
        "| operator | | size | dtype | ms | rate | of roofline | best peer | ratio | target | extra MB (peer) |",
        "|" + "---|" * 11,
    ]
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            memory = f"{row['extra_mb']} ({row['peer_extra_mb'] or '-'})" if row["extra_mb"] else ""
            cells = (
                row["operator"], row["direction"], row["shape"], row["dtype"], f"{float(row['ms']):,.1f}", row["rate"], row["of_floor"],
                row["best_peer"], row["ratio"], row["target"], memory,
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: BenchOptions) -> None:
    if options.markdown is not None:
        print(markdown(options.markdown))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU; --device cpu measures the CPU kernels")
    torch.manual_seed(0)
    file = RESULTS / (f"operators-cpu-{_chip.current().name}.csv" if options.device == "cpu" else "operators-cuda.csv")
    everything = not (options.only or options.dtype or options.shape)
    if options.out is None and (everything or options.update):
        options.out = file
    rows = read(file) if options.update and file.exists() else []
    # Not on a CPU, which is the default: a default device is a mode, and costs each call into torch from Python some microseconds.
    with torch.device("cuda") if options.device == "cuda" else nullcontext():
        table = (case for case in cases.table(options.only, options.dtype) if options.shape in case.shape)
        measure_all(options, table, rows)
        if options.out == file and options.device == "cpu" and _chip.current().name != _chip.UNKNOWN:
            rule.main()
            changed = {_call(row) for row in rule.stale(rows, _choice.rule()[0])}
            again = (case for case in cases.table() if (case.operator, case.direction, case.shape, case.dtype) in changed)
            if changed:
                measure_all(options, again, rows)
                rule.main()
    if options.out is not None:
        print(f"written: {options.out}")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main(tyro.cli(BenchOptions))
