"""A stage while it runs: its step, its batches and its clock."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ov3fast.recipes.config import Recipe, Stage
from ov3fast.training.capture import CapturedStep
from ov3fast.training.inputs import Inputs
from ov3fast.training.logs import Window
from ov3fast.training.progress import State
from ov3fast.training.schedule import Schedule
from ov3fast.training.step import Step


@dataclass
class StageRun:
    """A stage while it runs."""

    stage: Stage
    times: Schedule
    step: Step | CapturedStep
    inputs: Inputs
    flops_per_image: float
    """Of the step, forward and backward, per image of the batch."""
    began: float = 0.0
    """When the stage would have begun, had it never been stopped: time.monotonic() less its seconds so far."""
    before: float = 0.0
    """Seconds of the stages before."""
    minutes: float = 0.0
    """Of the stage, as all ranks see them."""
    done: bool = False

    def __post_init__(self) -> None:
        self.window = Window()

    def begin(self, state: State) -> None:
        """The next step is the state's, at its time."""
        self.began, self.before = time.monotonic() - state.stage_seconds, state.seconds - state.stage_seconds
        offset, steps = state.batches_left_out, self.times.steps
        self.inputs.start(state.stage_step + offset, None if steps is None else steps + offset)
        self.window = Window()

    def finished(self, state: State) -> bool:
        return self.done or self.times.finished(state.stage_step, state.stage_seconds / 60)

    def lr(self, state: State) -> float:
        return self.times.lr(state.stage_step, state.stage_seconds / 60)


def check_micro_batches(recipe: Recipe, world: int) -> None:
    """ValueError where a stage's batch or sub-batches can't be shared evenly by processes and micro-batches."""
    count = world * recipe.accumulate
    for stage in recipe.stages:
        for name in ("batch_size", "latent_images", "pixel_images", "caption_images"):
            value = getattr(stage, name)
            if value is not None and value % count:
                raise ValueError(
                    f"stage {stage.name!r}: {name} {value} is not divisible by {world} process(es) x {recipe.accumulate} micro-batch(es)"
                )


def length(times: Schedule) -> str:
    return f"{times.steps:,} steps" if times.steps is not None else f"{times.minutes:g} minutes"
