"""ov3fast compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ov3fast.cli.options import parse


@dataclass
class Compare:
    """Compare several runs: prints a table of their metrics, and writes a page with all curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of up to six runs, finished or not."""
    out: Path | None = None
    """The page to write, an .html file; without it only the table is printed."""
    axis: Literal["step", "images", "seconds"] = "step"
    """The x axis of the curves."""


def run(arguments: list[str]) -> int:
    given = parse(Compare, arguments, "compare")
    from rich.table import Table

    from ov3fast import terminal
    from ov3fast.evaluation.runs import differences, read_runs, table, write_page
    from ov3fast.io import check_writable

    if given.out is not None:
        check_writable(given.out, "--out")
    runs = read_runs(given.runs)
    if given.out is not None:
        write_page(given.out, runs, axis=given.axis)
    console = terminal.console(highlight=False)
    for title, rows in (("", table(runs)), ("Differences between the recipes", differences(runs))):
        if rows:
            shown = Table("", *(run.name for run in runs), title=title or None, title_justify="left")
            for row in rows:
                shown.add_row(*row, *[""] * (1 + len(runs) - len(row)))
            console.print(shown)
    if given.out is not None:
        console.print(f"page: {given.out}", soft_wrap=True, markup=False)
    return 0
