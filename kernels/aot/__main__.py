"""python -m ov3fast.kernels.aot"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import __doc__ as about
from .chips import CHIPS
from .estimate import TERMS
from .table import flat, markdown, rows, write_csv


@dataclass
class Options:
    target: tuple[str, ...] = tuple(CHIPS)
    """sm_80, sm_90, sm_100, gfx942."""
    op: tuple[str, ...] = ()
    """Operators; default: all."""
    dtype: tuple[str, ...] = ("fp32", "bf16", "fp16")
    json: Path | None = None
    csv: Path | None = None
    markdown: Path | None = None
    """Write a shorter table: one line per launch, one column per target."""
    jobs: int = os.cpu_count() or 1
    """Processes."""
    brief: bool = False
    """Print only the rows that fail a check."""


def main(options: Options) -> int:
    """Prints the table; returns 1 if a row fails a check."""
    unknown = sorted(set(options.target) - set(CHIPS))
    if unknown:
        raise ValueError(f"--target takes {', '.join(CHIPS)}; got {', '.join(unknown)}")
    console = Console(width=None if sys.stdout.isatty() else 220)
    with console.status("compiling") as status:
        table = rows(
            options.target,
            options.op,
            options.dtype,
            options.jobs,
            lambda row: status.update(f"{row['kernel']} {row['target']}"),
        )
    printed = Table(
        "kernel",
        "variant",
        "config",
        "dtype",
        "target",
        "regs",
        "stack",
        "spills",
        "shared",
        "mma",
        "16 B",
        "an SM",
        "tensor",
        "HBM",
        "MUFU",
        "issue",
        "alone",
        "",
    )
    short = [row for row in table if row["shortcomings"]]
    for row in short if options.brief else table:
        text = flat(row)
        printed.add_row(
            text["kernel"], text["variant"], text["config"], text["dtype"], text["target"], text["registers"], text["stack_bytes"],
            text["spills"], text["shared_bytes"], text["mma"], text["share16"], text["occupancy"],
            *(f"[bold]{text[term]}[/bold]" if term == f"{text['bound']}_us" else text[term] for term in TERMS), text["serial_us"],
            f"[red]{text['shortcomings']}[/red]" if text["shortcomings"] else text["exceptions"],
        )  # fmt: skip
    if printed.rows or not options.brief:
        console.print(printed)
    if options.csv is not None:
        write_csv(table, options.csv)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(table, indent=1))
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown([flat(row) for row in table]) + "\n", encoding="utf-8")
    console.print(f"{len(table)} rows, {len(short)} failed")
    return 1 if short else 0


def command() -> int:
    """Runs `main` with the options of the command line."""
    import tyro

    try:
        return main(tyro.cli(Options, description=about))
    except ValueError as reason:
        print(f"aot: {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(command())
