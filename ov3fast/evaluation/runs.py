"""Runs, read from their folders: one during training, as a page that refreshes itself, or several side by side.

write_page("watch.html", [read_run("runs/demo")], refresh_s=30)
write_page("compare.html", [read_run("runs/a"), read_run("runs/b")])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov3fast.evaluation.charts import Series, line_chart
from ov3fast.evaluation.curves import PANELS, SMOOTHING, boundaries, number, read_log
from ov3fast.evaluation.headline import format_value
from ov3fast.evaluation.report import LOG_FILE, SUMMARY_FILE
from ov3fast.evaluation.templates import template
from ov3fast.io import atomic_write
from ov3fast.recipes.config import leaves

MOST = 6
"""Most runs on a page: as many as a chart has colours."""
AXES = ("step", "images", "seconds")
FIGURES = (
    ("step", "steps", ",.0f"), ("images", "images", ",.0f"), ("seconds", "seconds", ",.0f"), ("images_per_s", "images/s", ",.1f"),
    ("loss", "loss", ".4f"), ("contrastive", "contrastive", ".4f"), ("caption", "caption", ".4f"), ("latent", "latent L1", ".4f"),
    ("pixel", "pixel L1", ".4f"), ("lpips", "LPIPS-style", ".4f"), ("peak_memory_gib", "peak memory, GiB", ".2f"),
    ("peak_gpu_memory_gib", "peak GPU memory, GiB", ".2f"), ("order_hash", "order of samples", ""),
)  # fmt: skip
"""(key, label, format) of the values taken from summary.json or the log's last row."""


@dataclass
class Run:
    """The contents of a run's folder."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """The headline's rows, from evaluation.json."""
    recipe: dict[str, Any] = field(default_factory=dict)

    def figure(self, key: str) -> Any:
        """From the summary, or else from the last row of the log that has it."""
        if key in self.summary:
            return self.summary[key]
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Reads a run. FileNotFoundError if the folder holds none."""
    folder = Path(folder).expanduser()
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run (there is no {folder / 'recipe.json'}); name a run's folder")
    evaluation = _json(folder / "evaluation.json")
    return Run(
        name or folder.name, folder, read_log(folder / LOG_FILE), _json(folder / SUMMARY_FILE), evaluation.get("metrics", []),
        _json(folder / "recipe.json"),
    )  # fmt: skip


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several runs, each named by the shortest end of its path that is unique. ValueError for more than MOST."""
    if not 1 <= len(folders) <= MOST:
        raise ValueError(f"compare takes up to {MOST} runs, got {len(folders)}")
    paths = [Path(folder).expanduser() for folder in folders]
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths) and length < max(len(path.parts) for path in paths):
        length += 1
    return [read_run(path, "/".join(path.parts[-length:])) for path in paths]


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of (label, one cell per run); a row of one cell is a heading. Values that no run has are left out."""
    rows = []
    for key, label, form in FIGURES:
        values = [run.figure(key) for run in runs]
        if any(value is not None for value in values):
            rows.append(
                [label, *("" if value is None else format(value, form) if form else str(value)[:12] for value in values)]
            )
    group = None
    for metric in {metric["id"]: metric for run in runs for metric in run.metrics}.values():
        if metric["group"] != group:
            group = metric["group"]
            rows.append([group])
        found = [next((m["value"] for m in run.metrics if m["id"] == metric["id"]), None) for run in runs]
        rows.append([metric["label"], *("" if value is None else format_value(value, metric["unit"]) for value in found)])
    return rows


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of (field, each run's value) for the fields of the recipes that differ."""
    fields = [dict(leaves({key: value for key, value in run.recipe.items() if key != "run_dir"})) for run in runs]
    names = dict.fromkeys(name for values in fields for name in values)
    rows = [[name, *(str(values.get(name, "")) for values in fields)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def charts(runs: Sequence[Run], axis: str = "step") -> list[str]:
    """A chart for each panel of the log with data, every run a line of it. axis: "step", "images" or "seconds"."""
    if axis not in AXES:
        raise ValueError(f"axis: must be one of {', '.join(AXES)}, got {axis!r}")
    ends = [row[axis] for run in runs for row in run.rows if number(row.get(axis)) is not None]
    made = []
    for title, lines, logarithmic in PANELS:
        for key, name in lines:
            series = [_series(run, axis, key, name if len(runs) == 1 else run.name) for run in runs]
            made.append(
                line_chart(
                    title if len(lines) == 1 else f"{title}: {name}", series, x_label=axis, log_y=logarithmic,
                    x_range=(min(ends), max(ends)) if ends else None, smoothing=0.0 if key == "lr" else SMOOTHING,
                    boundaries=boundaries(runs[0].rows) if len(runs) == 1 and axis == "step" else (),
                )
            )  # fmt: skip
    return [chart for chart in made if chart]


def write_page(
    path: str | Path, runs: Sequence[Run], *, axis: str = "step", refresh_s: float | None = None, status: str = ""
) -> Path:
    """Writes the page atomically and returns its path: figures and metrics, the fields that differ, and the curves.

    refresh_s: a browser reloads it after this many seconds. status: a line below the title.
    """
    import markupsafe

    html = template("runs.html").render(
        title=runs[0].name if len(runs) == 1 else " and ".join(run.name for run in runs),
        status=status,
        refresh=refresh_s,
        names=[run.name for run in runs],
        rows=table(runs),
        differences=differences(runs) if len(runs) > 1 else [],
        charts=[markupsafe.Markup(chart) for chart in charts(runs, axis)],
        error_scale="none",
    )
    path = Path(path).expanduser()
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def _series(run: Run, axis: str, key: str, name: str) -> Series:
    points = [
        (row[axis], row[key]) for row in run.rows if number(row.get(axis)) is not None and number(row.get(key)) is not None
    ]
    return Series(name, [x for x, _ in points], [y for _, y in points])


def _json(path: Path) -> dict[str, Any]:
    """The object in a file, {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
