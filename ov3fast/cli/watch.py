"""ov3fast watch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ov3fast.cli.options import parse

if TYPE_CHECKING:
    from ov3fast.evaluation.runs import Run

QUIET_S = 120.0
"""Seconds without a new row after which a run counts as silent; at least twenty times the usual interval between rows."""
BARS = " ▁▂▃▄▅▆▇█"
SPARK = 40


@dataclass
class Watch:
    """Follow a run in the terminal until it ends or Ctrl-C is pressed. Only reads the run's folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    every: float = 2.0
    """Seconds between updates."""
    page: Path | None = None
    """Also write a page with the curves that refreshes itself in the browser."""
    page_every: float = 30.0
    """Seconds between updates of the page."""
    once: bool = False
    """Show the current state and exit."""


def run(arguments: list[str]) -> int:
    given = parse(Watch, arguments, "watch")
    from rich.live import Live

    from ov3fast import terminal
    from ov3fast.evaluation.runs import read_run, write_page
    from ov3fast.io import check_writable

    if given.every <= 0 or given.page_every <= 0:
        raise ValueError(f"watch: --every and --page-every must be above 0, got {given.every:g} and {given.page_every:g}")
    if given.page is not None:
        check_writable(given.page, "--page")
    console = terminal.console(highlight=False)
    written, shown = -given.page_every, 0
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not given.once else None
    try:
        if live is not None:
            live.start()
        while True:
            run = read_run(given.run)
            state = _state(run, time.time())
            over = given.once or state.startswith("complete")
            if live is not None:
                live.update(_frame(run, state), refresh=True)
            elif given.once:
                console.print(_frame(run, state))
            else:  # no terminal: a line for every new row
                from ov3fast.training.logs import describe

                rows = [row for row in run.rows if row["step"] > shown]
                for row in rows:
                    console.print(describe(row, None), soft_wrap=True, markup=False)
                    shown = row["step"]
                if over:
                    console.print(state, soft_wrap=True, markup=False)
            if given.page is not None and (over or time.monotonic() - written >= given.page_every):
                write_page(
                    given.page, [run], refresh_s=None if state.startswith("complete") else given.page_every, status=state
                )
                written = time.monotonic()
            if over:
                return 0
            time.sleep(given.every)
    finally:
        if live is not None:
            live.stop()


def _state(run: Run, now: float) -> str:
    """Whether the run is complete, running or silent, and its progress."""
    if run.summary:
        return f"complete: {run.summary['step']:,} steps, {run.summary['images']:,} images, {_clock(run.summary['seconds'])}"
    if not run.rows:
        return "no row in the log yet"
    from ov3fast.evaluation.report import LOG_FILE

    silent = now - (run.folder / LOG_FILE).stat().st_mtime
    last, first = run.rows[-1], run.rows[max(0, len(run.rows) - 20)]
    usual = (last["seconds"] - first["seconds"]) / max(1, len(run.rows[-20:]) - 1)
    share, left = _progress(run)
    text = f"stage {last.get('stage', '')}: {100 * share:.1f} %" + (f", {_clock(left)} left" if left is not None else "")
    if silent > max(QUIET_S, 20 * usual):
        return f"silent for {_clock(silent)}; last at {text}"
    return f"running, {text}"


def _progress(run: Run) -> tuple[float, float | None]:
    """Fraction of the stage that is done, and the seconds left in it (None: not known yet)."""
    from ov3fast.recipes.config import Recipe
    from ov3fast.training.schedule import schedule

    last = run.rows[-1]
    recipe = Recipe.from_dict(run.recipe)
    stage = next((stage for stage in recipe.stages if stage.name == last.get("stage")), recipe.stages[-1])
    before = [row for row in run.rows if row.get("stage") != last.get("stage")]
    steps = last["step"] - (before[-1]["step"] if before else 0)
    seconds = last["seconds"] - (before[-1]["seconds"] if before else 0.0)
    share = schedule(stage).progress(steps, seconds / 60)
    return share, seconds * (1 - share) / share if share > 0 else None


def _frame(run: Run, state: str) -> Any:
    """The run as a table: each quantity's last and lowest value, and a sparkline."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ov3fast.evaluation.curves import PANELS, number

    table = Table("", "now", "lowest", "history", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for title, lines, _ in PANELS:
        for key, name in lines:
            values = [value for row in run.rows if (value := number(row.get(key))) is not None]
            if values:
                label = title if len(lines) == 1 else f"{title}: {name}"
                table.add_row(label, f"{values[-1]:.4g}", f"{min(values):.4g}", _spark(values))
    last = run.rows[-1] if run.rows else {}
    about = f"step {last['step']:,}, {last['images']:,} images, {_clock(last['seconds'])}" if last else ""
    checkpoints = sorted((run.folder / "checkpoints").glob("step-*")) if (run.folder / "checkpoints").is_dir() else []
    saved = f"newest checkpoint: {checkpoints[-1].name}" if checkpoints else "no checkpoint yet"
    return Group(Text(f"{run.folder}  {state}", style="bold"), Text(f"{about}  {saved}".strip()), table)


def _spark(values: list[float]) -> str:
    """A sparkline of the values, scaled to their own range."""
    from ov3fast.evaluation.charts import thin

    shown = thin(values, SPARK).tolist()
    low, high = min(shown), max(shown)
    return "".join(
        BARS[1 + round((len(BARS) - 2) * (value - low) / (high - low))] if high > low else BARS[4] for value in shown
    )


def _clock(seconds: float) -> str:
    from ov3fast.training.logs import clock

    return clock(seconds)
