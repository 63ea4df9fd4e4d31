"""A breakdown of the training steps of a finished run: seconds and images/s per part.

    make demo && python -m benches.step runs/demo          # writes benches/results/step.csv

Reads the run's summary.json. Nested parts are counted once; "backward" is that of all towers. "latent cache" is the VAE
encoder, run once per stage over all augmented pictures. Run the demo on a quiet machine.
"""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from . import timing

RESULTS = Path(__file__).parent / "results" / "step.csv"
NOT_IN_A_STEP = ("latent cache", "checkpoint", "measure")


@dataclass
class Options:
    run: tyro.conf.Positional[Path] = Path("runs/demo")
    """Folder of a finished run."""
    out: Path = RESULTS


def table(run: Path) -> list[dict[str, str]]:
    """One row per part, the largest first, then the full step. Raises FileNotFoundError if the run has not finished."""
    path = run / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"run: {run} has no summary.json; give the folder of a finished run")
    summary = json.loads(path.read_text(encoding="utf-8"))
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    parts = {part: seconds for part, seconds in summary["seconds_by_part"].items() if part not in NOT_IN_A_STEP}
    parts = {**dict(sorted(parts.items(), key=lambda item: -item[1])), "whole step": summary["seconds"]}
    machine = {
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "dtype": recipe["precision"],
        "batch": str(recipe["stages"][0]["batch_size"]),
        "commit": timing.commit(),
    }
    return [
        {
            "part": part,
            "seconds_per_step": f"{seconds / summary['step']:.4f}",
            "images_per_s": f"{summary['images'] / max(seconds, 1e-9):.0f}",
            **machine,
        }
        for part, seconds in parts.items()
    ]


def main(options: Options) -> None:
    rows = table(options.run)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['part']:<14} {row['seconds_per_step']:>9} s/step {row['images_per_s']:>9} images/s")


if __name__ == "__main__":
    main(tyro.cli(Options))
