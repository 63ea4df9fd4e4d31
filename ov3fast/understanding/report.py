"""understand.html: the demo's results against chance and the control, and held-out pictures with questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ov3fast.evaluation.curves import read_log
from ov3fast.evaluation.palette import png_data, scale_css
from ov3fast.evaluation.pictures import spread
from ov3fast.evaluation.templates import template
from ov3fast.io import atomic_write
from ov3fast.recipes.understand import UnderstandRecipe
from ov3fast.understanding.demo import CONTROL, HeldOut

SHOWN = 18
"""Pictures shown per set: evenly spaced, not selected by their answers."""


def write_page(path: Path, recipe: UnderstandRecipe, figures: dict[str, Any], sets: Sequence[HeldOut]) -> None:
    """The page loads nothing from the network, and the same input gives the same bytes."""
    runs = (("tower", recipe.run_dir), (CONTROL, recipe.run_dir / CONTROL))
    ends = {name: [(row["stage"], row["step"], row["loss"]) for row in _last_of_stages(run)] for name, run in runs}
    page = template("understand.html").render(
        recipe=recipe,
        headline=_row("all yes/no questions", figures["yes_no"]),
        rows=[(one.title, [_row(row["kind"], row) for row in figures["rows"] if row["set"] == one.title]) for one in sets],
        sets=[(one.title, _cards(one)) for one in sets],
        ends=ends,
        error_scale=scale_css(),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """clear: whether the interval of the difference lies above 0."""
    return {
        "name": name,
        "questions": row["questions"],
        "chance": f"{row['chance']:.1%}",
        "control": f"{row[CONTROL][0]:.1%}",
        "tower": f"{row['tower'][0]:.1%}",
        "interval": f"{row['tower'][1]:.1%} to {row['tower'][2]:.1%}",
        "difference": f"{100 * row['difference'][0]:+.1f}",
        "difference_interval": f"{100 * row['difference'][1]:+.1f} to {100 * row['difference'][2]:+.1f}",
        "clear": row["difference"][1] > 0,
        "share": row["tower"][0],
        "chance_share": row["chance"],
        "control_share": row[CONTROL][0],
    }


def _cards(one: HeldOut) -> list[dict[str, Any]]:
    """Sample pictures, each with all the questions asked about it."""
    cards = []
    for place in spread(len(one.facts), SHOWN):
        asked = [
            {
                "text": question.text,
                "answer": one.answers["tower"][number] or "(nothing)",
                "right": one.answers["tower"][number].lower() == question.answer,
                "truth": question.answer,
                "control": one.answers[CONTROL][number] or "(nothing)",
                "control_right": one.answers[CONTROL][number].lower() == question.answer,
            }
            for number, question in enumerate(one.questions)
            if question.picture == place
        ]
        cards.append({"name": one.facts[place].name, "image": png_data(one.images[place]), "asked": asked})
    return cards


def _last_of_stages(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_log(run_dir / "log.jsonl")
    return [row for row, after in zip(rows, [*rows[1:], None], strict=True) if after is None or after["stage"] != row["stage"]]
