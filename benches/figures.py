"""One row of the pretraining table, and the file that keeps them."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

from . import timing

RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """What was measured: `value` in `unit`, beside what it is held against."""

    what: str
    variant: str
    value: float
    unit: str
    floor: float | None = None
    """The same in the same unit as far as this machine goes: products at the rate of the best matrix product, bytes at that of a copy."""
    ratio: float | None = None
    """The figure that something was asked of."""
    asked: str = ""
    note: str = ""

    def columns(self) -> dict[str, str]:
        def short(value: float | None) -> str:
            return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

        return {name: short(v) if name in ("value", "floor", "ratio") else v for name, v in asdict(self).items()}


def path(chip: str) -> Path:
    return RESULTS / f"pretrain-{chip}.csv"


def keep(part: str, figures: list[Figure], order: list[str]) -> None:
    """Writes a part's rows in place of its former ones; the file has the parts in `order`."""
    machine = timing.machine()
    target = path(machine["chip"])
    rows: list[dict[str, str]] = []
    if target.exists():
        with target.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["part"] != part]
    told = {key: machine[key] for key in ("cpu", "threads", "torch", "commit")}
    rows += [{"part": part, **figure.columns(), **told} for figure in figures]
    rows.sort(key=lambda row: order.index(row["part"]) if row["part"] in order else len(order))
    RESULTS.mkdir(exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
