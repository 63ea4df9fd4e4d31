"""The table of compiled kernels, one row per kernel x config x dtype x target.

Registers, stack, spills, shared memory, matrix instructions and the fraction of 16-byte accesses come from the machine code, the work of one launch
from the kernel's entry (its bytes are distinct ones), and the lower bound on its time from the four terms of estimate.py. `shortcomings` lists the
checks that a row fails.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..lib.config import ANY
from . import cuda
from .catalog import Entry
from .chips import CHIPS
from .compile import Job, entries, measure_all, modules, variants
from .estimate import TERMS, estimate

WIDE = 0.75
"""Minimum fraction of a streaming kernel's static global bytes in 16-byte accesses; the rest is statistics and the like."""

COLUMNS = (
    "kernel", "op", "variant", "size", "config", "dtype", "target", "registers", "stack_bytes", "spills", "shared_bytes", "mma", "share16",
    "atomics", "problem", "flops", "bytes", "occupancy", *TERMS, "bound", "estimate_us", "serial_us", "exceptions", "shortcomings",
)  # fmt: skip


def rows(
    targets: Sequence[str] = tuple(CHIPS),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = ("fp32", "bf16", "fp16"),
    jobs: int = 1,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """The table: one dict with the keys of COLUMNS per kernel x config x dtype x target, for the given operators or all of them."""
    todo = [
        Job(module, number, config, size, dtype, target)
        for module in modules()
        for number, entry in enumerate(entries(module))
        if not ops or entry.op in ops
        for target in targets
        if target in entry.targets
        for dtype, size, config in variants(entry, target)
        if dtype in dtypes
    ]
    result = [None] * len(todo)
    for index, measured in measure_all(todo, jobs):
        job = todo[index]
        result[index] = describe(entries(job.module)[job.number], job, measured)
        progress(result[index])
    return result + [row for row in _rows_of_cuda(targets, ops) if row["dtype"] in dtypes]


def describe(entry: Entry, job: Job, measured: dict[str, Any]) -> dict[str, Any]:
    """The row of a compiled kernel."""
    work, chip = entry.work(job.dtype, job.config), CHIPS[job.target]
    measured = {
        **dict.fromkeys(("registers", "stack_bytes", "spills", "shared_bytes"), 0),
        "mma": {},
        "share16": 1.0,
        "atomics": {},
        **measured,
    }
    row = {
        "kernel": entry.name, "op": entry.op, "variant": entry.variant, "size": job.size, "config": str(job.config), "dtype": job.dtype,
        "target": job.target, **measured, "problem": entry.problem, "flops": work.flops, "bytes": work.once,
        **estimate(work, chip, job.dtype, entry.matrix, job.config.warps, measured),
    }  # fmt: skip
    lacks = _lacks(entry, row)
    excused = {gate: entry.excuse(gate, job.target, job.dtype) for gate in lacks}
    if "tensor cores" in lacks and job.dtype == "fp32" and any("TF32" in name for name in measured["mma"]):
        excused["tensor cores"] = _FEW_ROWS
    row["exceptions"] = "; ".join(f"{gate}: {reason}" for gate, reason in excused.items() if reason)
    row["shortcomings"] = "; ".join(f"{gate}: {what}" for gate, what in lacks.items() if not excused[gate])
    return {column: row[column] for column in COLUMNS}


_FEW_ROWS = "HMMA in TF32: three products a product leave registers for fewer rows than HGMMA takes"


def _lacks(entry: Entry, row: dict[str, Any]) -> dict[str, str]:
    """check -> what is wrong with the row."""
    target, chip, found = row["target"], CHIPS[row["target"]], {}
    if "error" in row:
        return {"compiles": row["error"].strip().splitlines()[-1]}
    if row["stack_bytes"]:
        found["stack"] = f"{row['stack_bytes']} bytes"
    # MI300 spills to its accumulation registers first: memory is involved only if there is a stack.
    if row["spills"] and (chip.backend == "cuda" or row["stack_bytes"]):
        found["spills"] = f"{row['spills']} loads and stores"
    if row["shared_bytes"] > chip.shared:
        found["shared"] = f"{row['shared_bytes']} bytes where {chip.name} has {chip.shared}"
    if row["atomics"]:
        found["atomics"] = f"{row['atomics']}: the order of programs shows in sums"
    if entry.streaming and chip.backend == "cuda" and row["share16"] < WIDE:
        found["wide"] = f"{row['share16']:.0%} of the bytes move in 16-byte accesses"
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA"}.get(target, "")
    if (
        entry.matrix
        and (row["dtype"] != "fp32" or target == "sm_90")
        and not any(name.startswith(wanted) for name in row["mma"])
    ):
        found["tensor cores"] = f"no {wanted or 'matrix'} instruction, but {row['mma'] or 'none'}"
    return found


def _rows_of_cuda(targets: Sequence[str], ops: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the CUDA C++ kernels, if nvcc is installed."""
    if ops and not {kernel.op for kernel in cuda.kernels()} & set(ops):
        return []
    defaults = dict.fromkeys(COLUMNS, "") | {"mma": {}, "atomics": {}, "share16": 1.0}
    found = [{**defaults, **row} for row in cuda.rows([t for t in targets if t in CHIPS and CHIPS[t].backend == "cuda"])]
    return [{column: row[column] for column in COLUMNS} for row in found if not ops or row["op"] in ops]


def flat(row: dict[str, Any]) -> dict[str, str]:
    """A row's values as text, for the CSV and the printed table."""
    numbers = {"flops": "{:.4g}", "bytes": "{:.4g}", "share16": "{:.2f}"}
    numbers |= dict.fromkeys((*TERMS, "estimate_us", "serial_us"), "{:.2f}")
    text = {}
    for column, value in row.items():
        if isinstance(value, dict):
            text[column] = " ".join(f"{count}x{name}" for name, count in value.items())
        else:
            text[column] = numbers[column].format(value) if column in numbers and value != "" else str(value)
    return text


def write_csv(table: Iterable[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat(row) for row in table)


def markdown(table: Sequence[dict[str, str]]) -> str:
    """Rows of the CSV as one table: one line per launch, one column per target, in bfloat16 if the kernel supports it."""
    narrow = {row["kernel"] for row in table if row["dtype"] == "bf16"}
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in table:
        if row["dtype"] == "bf16" or row["kernel"] not in narrow:
            how = " ".join(filter(None, (row["variant"], "" if row["size"] == ANY else row["size"])))
            work = f"{_short(row['flops'])}FLOP, {_short(row['bytes'])}B"
            lines.setdefault((row["kernel"], how, row["problem"], work), {})[row["target"]] = _cell(row)
    head = ["kernel", "variant", "size", "work", *(f"{chip.name} ({target})" for target, chip in CHIPS.items())]
    body = [[*launch, *(cells.get(target, "") for target in CHIPS)] for launch, cells in lines.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def _cell(row: dict[str, str]) -> str:
    matrix = sorted({re.split(r"[.]|_f32_", name.split("x", 1)[1])[0] for name in row["mma"].split()})
    parts = (
        f"{row['registers']} registers",
        f"{int(row['shared_bytes']) / 1024:.3g} KB" if row["shared_bytes"] not in ("", "0") else "",
        "+".join(matrix),
        _times(row) if row["estimate_us"] else "",
        f"({row['exceptions']})" if row["exceptions"] else "",
        f"**{row['shortcomings']}**" if row["shortcomings"] else "",
    )
    return ", ".join(filter(None, parts))


def _times(row: dict[str, str]) -> str:
    """The bound, then all four terms, and the time of a program alone on its SM if that is longer."""
    terms = " / ".join(f"{float(row[term]):.3g}" for term in TERMS)
    serial = float(row["serial_us"])
    alone = f", alone {serial:.3g}" if serial > 1.01 * float(row["estimate_us"]) else ""
    return f"**{float(row['estimate_us']):.3g} µs {row['bound']}** ({terms}; {row['occupancy']} an SM{alone})"


def _short(number: str) -> str:
    value = float(number)
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"
