"""A run's rows as they are made: to the log on the first rank, and as a line on the terminal."""

from __future__ import annotations

from typing import Any

from ov3fast.recipes.config import Recipe
from ov3fast.training.distributed import Ranks
from ov3fast.training.logs import Display, RunLog, describe
from ov3fast.training.progress import State
from ov3fast.training.signals import StopRequest
from ov3fast.training.stage import StageRun
from ov3fast.training.timing import Timer
from ov3fast.training.usage import Usage


class Journal:
    """`row` is the last row, {} before the first."""

    def __init__(self, recipe: Recipe, ranks: Ranks, timer: Timer, display: Display) -> None:
        self.recipe, self.ranks, self.display = recipe, ranks, display
        self.usage = Usage(timer, ranks)
        self.row: dict[str, Any] = {}
        self._log: RunLog | None = None

    def open(self, step: int) -> None:
        """Rows go to the log from here on, behind those up to `step`."""
        self._log = RunLog(self.recipe.run_dir, step, self.recipe.wandb, self.recipe.to_dict())

    def reopen(self, step: int) -> None:
        """The run went back to `step`: later rows are cut."""
        if self._log is not None:
            self._log.close()
            self.open(step)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def write(
        self, run: StageRun, state: State, lr: float, measured: dict[str, float], logit_scale: float, stop: StopRequest
    ) -> None:
        """Writes a row of means since the last one. Every rank must call it. A closed output pipe stops the run like a signal."""
        names, values, rate = run.window.take()
        means = (self.ranks.total(values) / self.ranks.world).tolist()
        self.row = {
            "step": state.step,
            "stage": run.stage.name,
            "images": state.images,
            "seconds": round(state.seconds, 3),
            "images_per_s": rate,
            **self.usage.row(rate, run.flops_per_image),
            "lr": lr,
            **dict(zip(names, means, strict=True)),
            "logit_scale": logit_scale,
            **measured,
        }
        if self._log is not None:
            self._log.write(self.row)
        last = run.finished(state)
        share = 1.0 if last else run.times.progress(state.stage_step, run.minutes)
        eta = 60 * run.minutes * (1 - share) / share if share > 0 else None
        try:
            self.display.update(run.stage.name, share, describe(self.row, eta), last)
        except BrokenPipeError:  # as on a signal, what was trained is saved
            stop.name = stop.name or "SIGPIPE"
