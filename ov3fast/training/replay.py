"""One step of a run computed again: its losses, from the newest checkpoint before it.

    replay(run_dir, 1234).row          # as the log's row of step 1234

Nothing is written. The steps between the checkpoint and this one are trained again. Where the run had several processes and this is one, its
micro-batches are worked through one after another: the same losses in another order of sums. (A stage measured in minutes took its learning
rates from the clock, so its steps beyond the first after a checkpoint are not quite the same.)
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ov3fast import ops
from ov3fast.recipes import read_recipe
from ov3fast.training import checkpoint, distributed
from ov3fast.training.logs import LOG, Display, read_rows
from ov3fast.training.loop import Run
from ov3fast.training.progress import RECIPE
from ov3fast.training.signals import StopRequest


class Replayed(NamedTuple):
    row: dict[str, Any]
    """What the log would hold of the step."""
    logged: dict[str, Any] | None
    """What it holds; None where it has no row of this step alone."""
    begun: int
    """Step of the checkpoint that the computation began at; 0: none."""


def replay(run_dir: str | Path, step: int, device: str | torch.device | None = None) -> Replayed:
    """Step number `step` of the run, counted from 1 as in its log. ValueError where the run has no such step."""
    run_dir = Path(run_dir).expanduser()
    recipe = read_recipe(run_dir / RECIPE)
    recipe = dataclasses.replace(
        recipe, run_dir=run_dir, log_every=1, gradient_norms_every=None, compare_impl=None, wandb=None, wall_minutes=None
    ).resolve()
    if step < 1:
        raise ValueError(f"replay: step must be at least 1, got {step}")
    ranks = distributed.start(device)
    saved = _before(recipe.checkpoints, step, ranks)
    if saved is not None:
        count = saved.state["world"] * saved.state["recipe"]["accumulate"]
        if count % ranks.world:
            raise ValueError(f"replay: the run's {count} micro-batches a step can't be shared by {ranks.world} processes")
        recipe = dataclasses.replace(recipe, accumulate=count // ranks.world)
    backend = ops.use(recipe.impl) if recipe.impl else nullcontext()
    with backend, StopRequest() as stop, Display(show=ranks.first) as display:
        run = Run(recipe, ranks, stop, display, until=step)
        run.set_up(saved)
        begun = run.state.step
        while run.state.step < step and run.interrupted and not run.stopped:
            run.train_stage(recipe.stages[run.state.stage])
    if run.journal.row.get("step") != step:
        raise ValueError(f"replay: {run_dir} ends at step {run.state.step}, got step {step}")
    rows = {row["step"]: row for row in read_rows(run_dir / LOG)}
    alone = step == 1 or step - 1 in rows
    return Replayed(run.journal.row, rows.get(step) if alone else None, begun)


def _before(where: str, step: int, ranks: distributed.Ranks) -> checkpoint.Checkpoint | None:
    folder = checkpoint.Folder(where)
    earlier = [saved for saved in checkpoint.steps(folder) if saved < step]
    return checkpoint.load(folder / f"{checkpoint.PREFIX}{earlier[-1]:08d}", ranks) if earlier else None
