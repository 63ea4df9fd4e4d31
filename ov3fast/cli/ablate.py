"""ov3fast ablate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ov3fast.cli.options import parse


@dataclass
class Ablate:
    """Train a recipe with one change at a time, over several seeds, and compare the runs on one page. Run the same command again to
    resume an interrupted set."""

    variants: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of variants (--list shows them); default: losses, pixels and noise. The unchanged recipe, `full`, is always included."""
    recipe: str = "demo"
    """A built-in recipe, or a .json or .yaml file; its first stage is trained."""
    seeds: int = 3
    """Runs per variant, at least 2."""
    steps: int | None = None
    """Steps per run; default: 200 if the stage's length is set in minutes, else the stage's own."""
    data: str = "demo"
    """Held-out shards for the metrics, or "demo"."""
    out: Path = Path("runs/ablation")
    """Folder of the runs, ablation.json and ablation.html."""
    list: bool = False
    """List the variants and exit."""


STEPS = 200


def run(arguments: list[str]) -> int:
    given = parse(Ablate, arguments, "ablate")
    from rich.table import Table

    from ov3fast import terminal
    from ov3fast.ablation import PAPER, VARIANTS, ablate, write_ablation_report
    from ov3fast.ablation.runs import Interrupted

    console = terminal.console(highlight=False)
    if given.list:
        shown = Table("variant", "change", "default")
        for variant in VARIANTS.values():
            shown.add_row(variant.name, variant.what, "yes" if variant.name in PAPER else "")
        console.print(shown)
        return 0
    from ov3fast.data.assets import fetch
    from ov3fast.data.demo import build_demo
    from ov3fast.models.config import LPIPSConfig
    from ov3fast.models.perceptual import build_lpips
    from ov3fast.recipes import SUFFIXES, get_recipe, read_recipe

    recipe = read_recipe(given.recipe) if Path(given.recipe).suffix in SUFFIXES else get_recipe(given.recipe)
    demo = given.data == "demo"
    steps = STEPS if given.steps is None and recipe.stages[0].minutes is not None else given.steps
    try:
        facts = ablate(
            recipe, given.variants or PAPER, seeds=given.seeds, steps=steps, out=given.out,
            data=build_demo() if demo else given.data,
            lpips=build_lpips(LPIPSConfig("squeezenet"), "cpu", fetch) if demo else None,
            note=lambda line: console.print(line, markup=False),
        )  # fmt: skip
    except Interrupted as stopped:
        console.print(str(stopped), markup=False)
        return stopped.code
    page = write_ablation_report(given.out, facts)
    _print(facts, given.out, console)
    console.print(f"page: {page}", soft_wrap=True, markup=False)
    return 0


def _print(facts: dict, out: Path, console: object) -> None:
    """Prints the page's table, one column per variant."""
    from rich.table import Table

    from ov3fast.ablation.report import table
    from ov3fast.evaluation.curves import read_log

    logs = {(run["variant"], run["seed"]): read_log(out / run["run"] / "log.jsonl") for run in facts["runs"]}
    rows, columns = table(facts, logs)
    shown = Table("mean over seeds, and difference to full ± 95 %", *(name for name, _ in rows))
    for i, column in enumerate(columns):
        cells = [cells[i] for _, cells in rows]
        shown.add_row(column, *(f"{cell['value']}\n{cell['difference']}" for cell in cells))
    console.print(shown)
