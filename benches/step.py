"""Where a step of the demo recipe goes: seconds and images/s per part, the baseline of all later work.

    python -m benches.step                  # 40 steps after 5 to warm up; writes benches/results/step.csv
    python -m benches.step --steps 10

Parts inside other parts count once; "backward" is that of all towers. Run it on a quiet machine.
"""

from __future__ import annotations

import csv
import dataclasses
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ov3fast.recipes import get_recipe
from ov3fast.training import train

RESULTS = Path(__file__).parent / "results" / "step.csv"


@dataclass
class Options:
    steps: int = 40
    warmup: int = 5
    """Steps that are run first and not counted."""
    out: Path = RESULTS


def measure(steps: int, warmup: int) -> list[dict[str, object]]:
    """One row per stage and part: seconds per step and images per second. The warm-up run's seconds are subtracted."""
    recipe = get_recipe("demo")
    rows = []
    for stage in recipe.stages:
        runs = []
        for length in (warmup, warmup + steps):
            with tempfile.TemporaryDirectory() as folder:
                short = dataclasses.replace(stage, minutes=None, steps=length)
                runs.append(
                    train(dataclasses.replace(recipe, stages=(short,), run_dir=Path(folder) / "run", checkpoint_minutes=None))
                )
        parts = {p: runs[1]["seconds_by_part"][p] - runs[0]["seconds_by_part"].get(p, 0.0) for p in runs[1]["seconds_by_part"]}
        images = stage.batch_size * steps
        for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
            if part != "checkpoint":
                rows.append(_row(stage.name, part, seconds / steps, images / max(seconds, 1e-9)))
        total = runs[1]["seconds"] - runs[0]["seconds"]
        rows.append(_row(stage.name, "whole step", total / steps, images / total))
    return rows


def _row(stage: str, part: str, seconds: float, rate: float) -> dict[str, object]:
    return {"stage": stage, "part": part, "seconds_per_step": f"{seconds:.4f}", "images_per_s": f"{rate:.0f}"}


def _machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "dtype": get_recipe("demo").precision,
    }


def main(options: Options) -> None:
    rows, machine = measure(options.steps, options.warmup), _machine()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    for row in rows:
        print(f"{row['stage']:<10} {row['part']:<14} {row['seconds_per_step']:>9} s/step {row['images_per_s']:>9} images/s")
    print(f"-> {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
