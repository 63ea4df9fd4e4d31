"""The operator table: every operator against the best that PyTorch offers for it, on this machine.

    make bench                                            # writes benches/results/operators-cpu.csv
    python -m benches.operators --only attention          # some rows, printed only
    ov3fast bench --device cuda                           # the same on a GPU, with the libraries that are installed: operators-cuda.csv

Variants take turns in one process. A row holds the median and quartiles of ours, the best peer and the ratio to it, GFLOP/s or GB/s, the
share of the floor (flops over the matrix-product rate or bytes over the copy rate, the longer, both measured in the same run), and by how
much the process grew beyond results. Rows that lose stay in. Use a quiet machine.
"""

from __future__ import annotations

import csv
import gc
from collections.abc import Iterable
from pathlib import Path

import torch
import tyro

from ov3fast.cli.bench import BenchOptions

from . import cases, timing

RESULTS = Path(__file__).parent / "results"


def measure(case: cases.Case, budget: float, floors: dict[str, float]) -> dict[str, str]:
    """One row of the table."""
    seconds = timing.interleaved(case.variants, budget)
    first, median, third = timing.quartiles(seconds[cases.OURS])
    peers = {name: timing.quartiles(runs)[1] for name, runs in seconds.items() if name != cases.OURS}
    best = min(peers, key=peers.get, default="")
    floor = max(case.flops / floors[case.dtype], case.bytes / floors["copy"])
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
    }
    if case.note_memory:
        for column, name in (("extra_mb", cases.OURS), ("peer_extra_mb", best)):
            used = timing.extra_memory(case.variants[name]) if name else None
            row[column] = "" if used is None else f"{max(0.0, used - case.result_bytes / 1e6):.0f}"
    return row


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.0f} GFLOP/s"


def measure_all(options: BenchOptions, table: Iterable[cases.Case]) -> list[dict[str, str]]:
    from rich.console import Console

    console = Console()
    floors = {dtype: timing.gemm_rate(kind) for dtype, kind in cases.DTYPES.items()} | {"copy": timing.copy_rate()}
    console.print(
        f"floors: fp32 {floors['fp32'] / 1e9:.0f} GFLOP/s, bf16 {floors['bf16'] / 1e9:.0f} GFLOP/s, copy {floors['copy'] / 1e9:.1f} GB/s"
    )
    facts = timing.machine()
    rows = []
    for case in table:
        if not options.compile:
            case.variants.pop("compile", None)
        row = measure(case, options.budget, floors)
        rows.append({**row, **{f"{name}_rate": f"{rate:.3e}" for name, rate in floors.items()}, **facts})
        if options.out is not None:
            write(rows, options.out)
        console.print(
            f"{row['operator']:<24} {row['direction']:<9} {row['shape']:<34} {row['dtype']:<5} {row['ms']:>10} ms  {row['rate']:>12}"
            f"  {row['of_floor']:>5} of floor  {row['ratio']:>6} x {row['best_peer']:<22} target {row['target']:<5}"
            f" {row['extra_mb'] and row['extra_mb'] + ' MB'}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        del case
        gc.collect()
    return rows


def write(rows: list[dict[str, str]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def markdown(path: Path) -> str:
    """A table of results for a README."""
    lines = [
        "| operator | | size | dtype | ms | rate | of floor | best peer | ratio | asked | extra MB (peer) |",
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
    if options.out is None and not options.only and not options.dtype:
        options.out = RESULTS / f"operators-{options.device}.csv"
    with torch.device(options.device):
        measure_all(options, cases.table(options.only, options.dtype))
    if options.out is not None:
        print(f"written: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(BenchOptions))
