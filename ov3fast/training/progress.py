"""A run's progress, the names in its folder, and resuming from its newest checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ov3fast.data.order import order_hash
from ov3fast.models.config import versions
from ov3fast.recipes.config import Recipe, Stage
from ov3fast.training import checkpoint
from ov3fast.training.distributed import Ranks

RECIPE, SUMMARY, TOKENIZER, MODEL = "recipe.json", "summary.json", "tokenizer", "model"
COMPARISON = "comparison.json"


@dataclass
class State:
    """A run's progress. With weights, optimizer and EMA, this is everything that a checkpoint holds."""

    step: int = 0
    """Optimizer steps done."""
    images: int = 0
    """Images seen."""
    seconds: float = 0.0
    """Wall time of training steps, over all starts."""
    stage: int = 0
    stage_step: int = 0
    stage_seconds: float = 0.0
    cursors: tuple[int, ...] | None = None
    """Units drawn from each source before this stage."""
    ended: dict[str, Any] | None = None
    """Where the stage before this one ended: its stage_step, stage_seconds and cursors, from which a longer one goes on."""
    skipped: int = 0
    """Steps, of those done, without an update: their loss was not finite or a spike."""
    batches_left_out: int = 0
    """Batches of this stage skipped by rollbacks: those from the checkpoint to the bad step."""
    recent: list[float] = field(default_factory=list)
    """Losses of the last steps, if spikes are watched for."""
    order_hash: str = ""
    """Running sha256 of the samples' numbers, in order."""

    def advance(self, images: int, stage_seconds: float, seconds_before: float, samples: np.ndarray) -> None:
        """Counts a step. stage_seconds: of this stage so far; seconds_before: of the stages before it."""
        self.step += 1
        self.stage_step += 1
        self.images += images
        self.stage_seconds, self.seconds = stage_seconds, seconds_before + stage_seconds
        self.order_hash = order_hash(self.order_hash, samples.tolist())

    def end_stage(self, cursors: tuple[int, ...]) -> None:
        """On to the next stage, which draws from `cursors` on."""
        self.ended = {
            "stage_step": self.stage_step, "stage_seconds": self.stage_seconds, "cursors": self.cursors,
            "batches_left_out": self.batches_left_out,
        }  # fmt: skip
        self.cursors = cursors
        self.stage, self.stage_step, self.stage_seconds, self.batches_left_out = self.stage + 1, 0, 0.0, 0


def find_checkpoint(
    recipe: Recipe, ranks: Ranks, note: Callable[[str], None], *, resume: bool, overwrite: bool, extend: bool
) -> checkpoint.Checkpoint | None:
    """The checkpoint to resume a run in recipe.run_dir from, or None to start from scratch. Raises as documented in `train`.

    overwrite without resume removes what the former run left.
    """
    folder = checkpoint.Folder(recipe.checkpoints)
    present = checkpoint.steps(folder)
    if any(other != present for other in ranks.gather(present)):
        raise ValueError(
            f"checkpoints: the processes don't see the same in {folder}; it must be on a disk that all of them share"
        )
    if not resume and present:
        if not overwrite:
            raise FileExistsError(
                f"run_dir: {recipe.run_dir} holds a run that got to step {present[-1]}; resume it, overwrite it, or name another run_dir"
            )
        if ranks.first:
            for step in present:
                folder.fs.rm(f"{folder.root}/{checkpoint.PREFIX}{step:08d}", recursive=True)
            for name in (TOKENIZER, MODEL):
                shutil.rmtree(recipe.run_dir / name, ignore_errors=True)
            (recipe.run_dir / COMPARISON).unlink(missing_ok=True)
        ranks.wait()
    if not resume:
        return None
    saved = checkpoint.latest(folder, ranks)
    if saved is None:
        note(f"no checkpoint in {folder}: starting from the beginning")
        return None
    difference = recipe.difference(saved.state["recipe"], longer=extend)
    if difference is not None:
        raise ValueError(f"resume: {saved.folder} is of another recipe ({difference}); use its recipe or another run_dir")
    if saved.state["world"] != ranks.world:
        note(f"resuming a run of {saved.state['world']} process(es) with {ranks.world}: the same samples, not the same bits")
    for package, version in versions().items():
        former = saved.state.get(package, "an earlier version")
        if former != version:
            note(f"saved by {package} {former}, this is {version}: bits may differ")
    return saved


def restored_state(saved: checkpoint.Checkpoint, stages: Sequence[Stage], extend: bool) -> State:
    """The state in a checkpoint. With extend, and if `stages` lengthens the last finished stage, the state at the end of that stage."""
    values = saved.state["progress"]
    cursors = values["cursors"]
    state = State(**{**values, "cursors": None if cursors is None else tuple(cursors)})
    if extend:
        _reopen(state, stages, saved)
    return state


def _reopen(state: State, stages: Sequence[Stage], saved: checkpoint.Checkpoint) -> None:
    """Reopens the last finished stage if it has become longer."""
    former = Recipe.from_dict(saved.state["recipe"]).stages
    if not state.stage or state.stage_step or stages[state.stage - 1] == former[state.stage - 1]:
        return
    if state.ended is None:
        raise ValueError("extend: this run was saved by an earlier version, which did not say how its stage ended; add a stage")
    cursors = state.ended["cursors"]
    state.stage -= 1
    state.stage_step, state.stage_seconds = state.ended["stage_step"], state.ended["stage_seconds"]
    state.batches_left_out = state.ended.get("batches_left_out", 0)
    state.cursors = None if cursors is None else tuple(cursors)
