"""Derives the choice of CPU backends, ov3fast/ops/choices.csv, from benches/results/operators-cpu-CHIP.csv of every chip.

    python -m benches.rule        # after such a file has changed; `make bench` does it too, and a test checks it

For each measured operator, dtype and size, a forward call uses the backend that was never far from the fastest, alone and with its backward after it, and a
backward call the same or the one that, after that forward, makes both together fastest by a tenth: backends share their saved tensors, so they can be
mixed. The time of a mixture is the sum of its parts until it has been measured itself.
Our kernels are kept unless another backend is more than 1.5 % faster, so that a tie doesn't change what a run computes. torch.compile and
F.linear_cross_entropy are baselines, not backends. If an older file has only our kernels and such baselines, and a baseline wins, PyTorch's own
products are chosen.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

from ov3fast.ops import _choice
from ov3fast.ops._choice import OURS, Choice
from ov3fast.ops._trials import WITHIN, pick, pick_backward, pick_forward

RESULTS = Path(__file__).parent / "results"

Evidence = list[dict[str, str]]
Milliseconds = dict[str, float]


def evidence() -> dict[str, Evidence]:
    """chip -> rows of its file."""
    found = {}
    for path in sorted(RESULTS.glob("operators-cpu-*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found[path.stem.removeprefix("operators-cpu-")] = list(csv.DictReader(file))
    return found


def milliseconds(text: str) -> Milliseconds:
    """Parses "cpu 1.5; eager 2.0"."""
    return {name: float(value) for name, _, value in (item.rpartition(" ") for item in text.split("; ") if item)}


def decide(rows: Evidence) -> list[Choice]:
    """The choices for one chip."""
    groups: dict[tuple[str, str, tuple[int, ...]], dict[str, dict[str, str]]] = {}
    for row in rows:
        op = row["operator"].split()[0]
        if op in _choice.SIZES and row["size"]:
            if (op, row["direction"]) == ("linear_cross_entropy", "both"):
                op = "linear_cross_entropy_total"
            groups.setdefault((op, row["dtype"], tuple(map(int, row["size"].split()))), {})[row["direction"]] = row
    choices = []
    for (op, dtype, size), by_direction in sorted(groups.items()):
        times = {direction: _times(op, row) for direction, row in by_direction.items()}
        forward = times.get("forward") or times.get("both")
        if forward is None:
            continue
        choices.append(first := _forward(op, dtype, size, forward, times.get("both", {}) if "forward" in times else {}))
        if op == "linear_cross_entropy_total":  # its forward computes the gradients
            continue
        if "backward" in times:
            choices.append(_pick(op, "backward", dtype, size, times["backward"]))
        elif "both" in times:
            choices.append(_pick(op, "backward", dtype, size, pairs(by_direction["both"], times, first.backend), first.backend))
    return choices


def pairs(row: dict[str, str], times: dict[str, Milliseconds], first: str) -> Milliseconds:
    """backend -> time of forward plus backward, with `first` for the forward and this backend for the backward."""
    both, forward = times["both"], times.get("forward", {})
    found = {name: both[name] - forward[name] + forward[first] for name in both if name in forward and first in forward}
    found[first] = both[first]
    measured, _, second = row["chosen"].partition(" + ")
    if second and measured == first:
        found[second] = float(row["ms"])
    return found


def _times(op: str, row: dict[str, str]) -> Milliseconds:
    """Times of the backends in this row; nan for a backend that stands in for faster baselines."""
    times, peers = milliseconds(row["backends"]), milliseconds(row["peers"])
    products = _choice.PRODUCTS.get(op)
    if set(times) == {OURS} and products is not None and peers:
        best = min(peers, key=lambda name: peers[name])
        if products in peers:
            times[products] = peers[products]
        elif peers[best] < WITHIN * times[OURS]:
            times[products] = math.nan
    return times


def _forward(op: str, dtype: str, size: tuple[int, ...], forward: Milliseconds, both: Milliseconds) -> Choice:
    if any(map(math.isnan, (*forward.values(), *both.values()))) or not forward.keys() & both.keys():
        return _pick(op, "forward", dtype, size, forward)
    return pick_forward(op, dtype, size, forward, both)


def _pick(op: str, direction: str, dtype: str, size: tuple[int, ...], times: Milliseconds, first: str = "") -> Choice:
    unknown = [name for name, value in times.items() if math.isnan(value)]
    if unknown:
        return Choice(op, direction, dtype, size, unknown[0], math.nan, "")
    return pick_backward(op, dtype, size, times, first) if first else pick(op, direction, dtype, size, times)


def stale(rows: Evidence, table: _choice.Table) -> Evidence:
    """The rows whose automatic choice when measured differs from the table's current choice."""
    return [row for row in rows if row["size"] and row["chosen"] and row["chosen"] != taken(row, table)]


def taken(row: dict[str, str], table: _choice.Table) -> str:
    """The table's choice for this row's call, in the format of the column `chosen`."""
    op, size = row["operator"].split()[0], tuple(map(int, row["size"].split()))
    if (op, row["direction"]) == ("linear_cross_entropy", "both"):
        op = "linear_cross_entropy_total"
    if op not in _choice.SIZES:
        return OURS
    forward, backward = (_choice.by_table(table, op, direction, row["dtype"], size) for direction in _choice.DIRECTIONS)
    if row["direction"] == "forward" or op == "linear_cross_entropy_total":
        return forward
    return backward if row["direction"] == "backward" or forward == backward else f"{forward} + {backward}"


def table() -> str:
    """The contents of choices.csv."""
    return _choice.render({chip: decide(rows) for chip, rows in evidence().items()})


def main() -> None:
    _choice.TABLE.write_text(table(), encoding="utf-8")
    _choice.committed.cache_clear()
    print(f"written: {_choice.TABLE}")
    for chip, rows in evidence().items():
        for row in stale(rows, _choice.committed()[chip]):
            now = taken(row, _choice.committed()[chip])
            print(
                f"{chip}: {row['operator']} {row['direction']} {row['shape']} {row['dtype']}: measured with {row['chosen']}, now {now}"
            )


if __name__ == "__main__":
    main()
