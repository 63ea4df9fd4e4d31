"""The metrics of a run that has ended, which `train` returns and summary.json keeps."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ov3fast.io import atomic_write
from ov3fast.recipes.config import Recipe
from ov3fast.training import compare
from ov3fast.training.progress import COMPARISON, State
from ov3fast.training.timing import Timer


def final_metrics(
    recipe: Recipe, state: State, row: Mapping[str, Any], timer: Timer, device: torch.device, interrupted: bool
) -> dict[str, Any]:
    """The log's last row, the run's totals, its peak of memory, and the comparison where one was made."""
    metrics = {
        **{key: value for key, value in row.items() if key not in ("step", "images", "seconds", "stage")},
        "step": state.step,
        "images": state.images,
        "seconds": state.seconds,
        "interrupted": interrupted,
        "order_hash": state.order_hash,
        "seconds_by_part": timer.table(),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if (recipe.run_dir / COMPARISON).is_file():
        metrics["comparison"] = json.loads((recipe.run_dir / COMPARISON).read_text(encoding="utf-8"))
    if device.type == "cuda":
        metrics["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return metrics


def describe_metrics(metrics: Mapping[str, Any], model: Path) -> Iterator[str]:
    """Lines for the terminal. model: the folder of the final model."""
    seconds = metrics["seconds_by_part"]
    total = sum(seconds.values()) or 1.0
    for part, value in seconds.items():
        yield f"  {part:<14} {value:9.1f} s  {100 * value / total:5.1f} %"
    if "comparison" in metrics:
        yield compare.describe(metrics["comparison"])
    yield f"done: {metrics['step']} steps, {metrics['images']:,} images; model in {model}"


def write_json(path: Path, values: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
