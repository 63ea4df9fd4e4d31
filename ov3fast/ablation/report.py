"""ablation.html: curves with bands, the table of differences, and the branches' gradients.

A line is the mean over seeds, its band their range. Differences are paired by seed, variant minus full; the interval is
Student's t at 95 % (n - 1 degrees of freedom), shown in bold if it excludes zero. With three seeds that is a high bar: a
difference that is not bold is not evidence of no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ov3fast.evaluation.charts import Series, line_chart
from ov3fast.evaluation.curves import number, read_log
from ov3fast.evaluation.headline import format_value
from ov3fast.evaluation.report import LOG_FILE
from ov3fast.evaluation.templates import template
from ov3fast.io import atomic_write

from .variants import FULL

PAGE = "ablation.html"
CURVES = (
    ("pixel", "Pixel L1", True), ("latent", "Latent L1", True), ("caption", "Caption", True), ("contrastive", "Contrastive", True),
    ("rec_grad_norm", "Gradient of L_rec at the tokens", True), ("und_grad_norm", "Gradient of L_und at the tokens", True),
    ("grad_cosine", "Cosine of the two gradients", False),
)  # fmt: skip
"""(log key, title, logarithmic)."""
METRICS = (
    ("style/image_to_text/R@1", "image to text, R@1", "%"), ("style/image_to_text/R@10", "image to text, R@10", "%"),
    ("unseen/image_to_text/R@10", "unseen concepts, R@10", "%"), ("data/image_to_text/R@1", "image to text, R@1", "%"),
    ("probe/accuracy", "linear probe", "%"), ("pictures/psnr", "pictures, PSNR", "dB"), ("pictures/lpips_style", "pictures, LPIPS-style", ""),
    ("photos/psnr", "photos, PSNR", "dB"), ("photos/lpips_style", "photos, LPIPS-style", ""),
)  # fmt: skip
"""(headline metric id, label, unit)."""
TAIL = 0.1
"""Fraction of a run's rows, at its end, whose mean is reported as the final loss."""
STUDENT_95 = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantile of Student's t by degrees of freedom; the normal quantile is used beyond the table."""


@dataclass(frozen=True)
class Cell:
    """A variant's metric: mean and standard deviation over seeds; mean difference from full and its 95 % half-width."""

    mean: float
    spread: float
    difference: float | None = None
    half_width: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.difference is not None and self.half_width is not None and abs(self.difference) > self.half_width


def cell(values: Sequence[float], full: Sequence[float] | None = None) -> Cell:
    """values, full: one per seed, in the same order; full is None for the full recipe itself."""
    spread = statistics.stdev(values)
    if full is None:
        return Cell(statistics.fmean(values), spread)
    differences = [value - base for value, base in zip(values, full, strict=True)]
    n = len(differences)
    quantile = STUDENT_95[n - 1] if n <= len(STUDENT_95) else 1.96
    return Cell(
        statistics.fmean(values), spread, statistics.fmean(differences), quantile * statistics.stdev(differences) / n**0.5
    )


def write_ablation_report(out: str | Path, facts: dict[str, Any]) -> Path:
    """Writes OUT/ablation.html from the result of `ablate` and the runs' logs; returns its path."""
    import markupsafe

    out = Path(out).expanduser()
    logs = {(run["variant"], run["seed"]): read_log(out / run["run"] / LOG_FILE) for run in facts["runs"]}
    rows, columns = table(facts, logs)
    stage = facts["recipe"]["stages"][0]
    groups: dict[str, list[str]] = {}
    for variant in facts["variants"]:
        if variant["group"]:
            groups.setdefault(variant["group"], [FULL]).append(variant["name"])
    page = template("ablation.html").render(
        recipe=facts["recipe"]["name"], seeds=facts["seeds"], steps=stage["steps"], batch=stage["batch_size"], size=stage["image_size"],
        variants=facts["variants"], columns=columns, rows=rows,
        groups=[(group, [markupsafe.Markup(chart) for chart in _charts(group, names, logs, facts["seeds"])]) for group, names in groups.items()],
        error_scale="none",
    )  # fmt: skip
    with atomic_write(out / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out / PAGE


def table(
    facts: dict[str, Any], logs: dict[tuple[str, int], list[dict[str, Any]]]
) -> tuple[list[tuple[str, list[dict[str, Any]]]], list[str]]:
    """([(variant, one text cell per column)], columns): metrics available in all runs, and the final losses."""
    seeds = range(facts["seeds"])
    by_run = {(run["variant"], run["seed"]): run["metrics"] for run in facts["runs"]}
    measured = [m for m in METRICS if all(number(metrics.get(m[0])) is not None for metrics in by_run.values())]
    ends = [(key, title) for key, title, _ in CURVES[:4] if all(_end(rows, key) is not None for rows in logs.values())]
    columns = [label for _, label, _ in measured] + [f"{title}, end of training" for _, title in ends]
    rows = []
    for variant in (v["name"] for v in facts["variants"]):
        cells = []
        for values, unit in (
            *(({(v, s): by_run[v, s][id] for v, s in by_run}, unit) for id, _, unit in measured),
            *(({run: _end(logs[run], key) for run in logs}, "") for key, _ in ends),
        ):
            own, full = ([values[name, seed] for seed in seeds] for name in (variant, FULL))
            cells.append(_text(cell(own, None if variant == FULL else full), unit))
        rows.append((variant, cells))
    return rows, columns


def _text(found: Cell, unit: str) -> dict[str, Any]:
    scale, form = (100.0, ".1f") if unit == "%" else (1.0, ".2f") if unit == "dB" else (1.0, ".3f")
    difference = ""
    if found.difference is not None and found.half_width is not None:
        difference = f"{scale * found.difference:+{form}} ± {scale * found.half_width:{form}}"
    spread = f"{scale * found.spread:{form}}"
    return {"value": format_value(found.mean, unit), "spread": spread, "difference": difference, "bold": found.excludes_zero}


def _end(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if number(row.get(key)) is not None]
    return statistics.fmean(values[-max(1, round(TAIL * len(values))) :]) if values else None


def _charts(group: str, names: Sequence[str], logs: dict[tuple[str, int], list[dict[str, Any]]], seeds: int) -> list[str]:
    """One chart per curve, with the full recipe and the group's variants."""
    charts = []
    for key, title, logarithmic in CURVES:
        lines = [_band(name, [logs[name, seed] for seed in range(seeds)], key) for name in names]
        charts.append(line_chart(title, lines, log_y=logarithmic, prefix=group))
    return [chart for chart in charts if chart]


def _band(name: str, logs: Sequence[list[dict[str, Any]]], key: str) -> Series:
    by_step: dict[int, list[float]] = {}
    for rows in logs:
        for row in rows:
            if number(row.get(key)) is not None:
                by_step.setdefault(row["step"], []).append(row[key])
    steps = sorted(step for step, values in by_step.items() if len(values) == len(logs))
    values = [by_step[step] for step in steps]
    return Series(name, steps, [statistics.fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values])
