"""Learning-rate schedule of one stage: linear warm-up, then cosine to a floor.

A stage of a fixed number of steps is a pure function of the step. A stage of a wall-time budget (`minutes`) follows the
clock: its progress is elapsed / budget, so it ends on time on any machine, and its rates are those of the machine's speed.

Rounding is big_vision's: steps = round(epochs * samples_per_epoch / batch_size), at least 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ov3fast.recipes.config import Stage


@dataclass(frozen=True)
class Schedule:
    """A stage resolved into steps (or minutes) and rates; lr() gives the rate of one step."""

    peak_lr: float
    min_lr: float
    steps: int | None
    """Optimizer steps, or None for a wall-time budget."""
    minutes: float | None
    warmup_steps: int | None
    """None: the warm-up is a share of the wall time."""
    warmup_minutes: float | None

    def progress(self, step: int, minutes: float) -> float:
        """Share of the stage that is done before step `step` (from 0), `minutes` after its start; 0 to 1."""
        done = step / self.steps if self.steps is not None else minutes / self.minutes
        return min(max(done, 0.0), 1.0)

    def finished(self, step: int, minutes: float) -> bool:
        """True when step `step` is past the stage's end."""
        return step >= self.steps if self.steps is not None else minutes >= self.minutes

    def lr(self, step: int, minutes: float = 0.0) -> float:
        """Rate of step `step` (from 0), `minutes` after the stage's start.

        Warm-up over w steps: peak * (step + 1) / w for step < w; then min + (peak - min) * (1 + cos(pi * t)) / 2 with t the
        share of the rest that is done.
        """
        if self.steps is not None:
            at, total, warmup = float(step), float(self.steps), float(self.warmup_steps or 0)
            ramp = (step + 1) / warmup if step < warmup else 1.0
        else:
            at, total, warmup = minutes, self.minutes, self.warmup_minutes or 0.0
            ramp = minutes / warmup if minutes < warmup else 1.0
            if self.warmup_steps:
                ramp = min(1.0, (step + 1) / self.warmup_steps)
        if ramp < 1.0:
            return self.peak_lr * ramp
        t = min(max((at - warmup) / max(total - warmup, 1e-12), 0.0), 1.0)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * t))


def schedule(stage: Stage, min_lr: float = 0.0) -> Schedule:
    """Resolves a stage's epochs, steps or minutes, its warm-up and its learning-rate rule."""
    peak = stage.base_lr * stage.batch_size / 256 if stage.lr_rule == "base*batch/256" else stage.base_lr
    steps = stage.steps
    if stage.epochs is not None:
        steps = _steps(stage.epochs, stage)
    warmup_steps, warmup_minutes = stage.warmup_steps, None
    if stage.warmup_epochs is not None:
        warmup_steps = _steps(stage.warmup_epochs, stage)
    elif stage.warmup_fraction is not None and steps is not None:
        warmup_steps = round(stage.warmup_fraction * steps)
    elif stage.warmup_fraction is not None:
        warmup_minutes = stage.warmup_fraction * stage.minutes
    if steps is not None:
        warmup_steps = warmup_steps or 0
        if warmup_steps > steps:
            raise ValueError(f"stage {stage.name!r}: the warm-up of {warmup_steps} steps is longer than its {steps} steps")
    return Schedule(peak, min_lr, steps, stage.minutes, warmup_steps, warmup_minutes)


def _steps(epochs: float, stage: Stage) -> int:
    return max(1, round(epochs * stage.samples_per_epoch / stage.batch_size)) if epochs else 0
