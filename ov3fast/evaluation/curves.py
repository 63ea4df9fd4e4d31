"""The training log as charts and as rows of rates.

A log row is a JSON object with "step", optionally "stage", and numbers: losses, learning rate, gradient norms, images per second. Missing
values are left out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ov3fast.evaluation.charts import Boundary, Series, line_chart

PANELS: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("Total loss", (("loss", "loss"),), True),
    ("Contrastive", (("contrastive", "contrastive"),), True),
    ("Caption", (("caption", "caption"),), True),
    ("Latent L1", (("latent", "latent"),), True),
    ("Pixel L1", (("pixel", "pixel"),), True),
    ("LPIPS-style", (("lpips", "lpips"),), True),
    ("Learning rate", (("lr", "lr"),), False),
    ("Gradient norm", (("grad_norm", "all"),), True),
    ("Gradient norm at the tokens", (("rec_grad_norm", "reconstruction"), ("und_grad_norm", "understanding")), True),
    ("Cosine of the branches' gradients", (("grad_cosine", "cosine"),), False),
    ("Logit scale", (("logit_scale", "scale"),), False),
    ("Images per second", (("images_per_s", "rate"),), False),
)
"""(title, ((key in the log, name in the legend), ...), logarithmic)."""

SMOOTHING = 0.05


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL log, [] if there is none; a truncated last line is left out."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(lines := path.read_text(encoding="utf-8").splitlines()):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise ValueError(f"read_log: line {number + 1} of {path} is not JSON") from None
    return rows


def curves(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One small SVG chart for each panel with data in the log."""
    if not rows:
        return []
    stages, steps = boundaries(rows), (rows[0]["step"], rows[-1]["step"])
    charts = []
    for title, lines, logarithmic in PANELS:
        series = [_series(rows, key, name) for key, name in lines]
        smoothing = 0.0 if title == "Learning rate" else SMOOTHING
        charts.append(line_chart(title, series, boundaries=stages, x_range=steps, log_y=logarithmic, smoothing=smoothing))
    return [chart for chart in charts if chart]


def boundaries(rows: Sequence[dict[str, Any]]) -> list[Boundary]:
    """Where each stage starts, if there is more than one."""
    starts: dict[str, float] = {}
    for row in rows:
        if row.get("stage") is not None:
            starts.setdefault(str(row["stage"]), row["step"])
    return [Boundary(step, name) for name, step in starts.items()] if len(starts) > 1 else []


def throughput(rows: Sequence[dict[str, Any]], tables: dict[str, Any], summary: dict[str, Any]) -> list[list[str]]:
    """Rows of a table (a row of one cell is a heading): images per second in training, by stage; where a run's time went; the rate of each
    part of the evaluation."""
    cells: list[list[str]] = []
    rates: dict[str, list[float]] = {}
    for row in rows:
        if number(row.get("images_per_s")) is not None:
            rates.setdefault(str(row.get("stage", "training")), []).append(row["images_per_s"])
    if rates:
        cells.append(["Training, images/s: median of the log's rows"])
        cells += [[stage, f"{statistics.median(values):,.1f}", f"{len(values)} rows"] for stage, values in rates.items()]
    if comparison := summary.get("comparison"):
        other, ratio = comparison["other"], comparison["ratio"]
        cells.append([f"Whole steps in turn, images/s: medians of {comparison['rounds']}"])
        cells.append(["chosen kernels", f"{comparison['images_per_s']:,.1f}", f"{ratio:.2f} x"])
        cells.append([f"impl={other}", f"{comparison['other_images_per_s']:,.1f}", "1.00 x"])
    parts = {part: seconds for part, seconds in summary.get("seconds_by_part", {}).items() if number(seconds) is not None}
    if total := sum(parts.values()):
        cells.append([f"Training, where {total:,.0f} s went"])
        cells += [[part, f"{100 * seconds / total:.1f} %", f"{seconds:,.1f} s"] for part, seconds in parts.items()]
    for key, label in (("peak_memory_gib", "peak memory"), ("peak_gpu_memory_gib", "peak GPU memory")):
        if number(summary.get(key)) is not None:
            cells.append([label, f"{summary[key]:.2f} GiB", ""])
    if tables["images_per_s"]:
        cells.append(["Evaluation, items/s"])
        cells += [[part, f"{rate:,.1f}", f"{tables['seconds'][part]:.1f} s"] for part, rate in tables["images_per_s"].items()]
    return cells


def _series(rows: Sequence[dict[str, Any]], key: str, name: str) -> Series:
    points = [(row["step"], row[key]) for row in rows if number(row.get(key)) is not None]
    return Series(name, [x for x, _ in points], [y for _, y in points])


def number(value: Any) -> float | None:
    """The value, if it is a finite number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
