"""The training loop: a recipe's stages as one run.

    from ov3fast.training import train
    metrics = train(recipe)                    # or train(recipe, resume=True)

    runs/demo/  recipe.json  log.jsonl  tensorboard/  checkpoints/step-.../  model/  comparison.json  summary.json

Every step is a function of (recipe, step): sample order, augmentation, noise and sub-batches are counter-based, so a run resumed from
a checkpoint has the same bits as one that was never stopped, in the same layout of processes. (A stage measured in minutes follows the
clock, so its learning rates depend on the machine's speed.) SIGTERM, SIGUSR1 or Ctrl-C: the run saves after the current step and returns with
metrics["interrupted"]; scripts end with EXIT_INTERRUPTED then. A loss that is not finite ends the run before it changes a weight, or as
recipe.on_spike says.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ov3fast import ops
from ov3fast.data.assets import fetch
from ov3fast.data.store import SampleStore
from ov3fast.io import check_writable_folder, naming_full_disk
from ov3fast.losses import Objective
from ov3fast.models.config import VERSIONS, versions
from ov3fast.models.perceptual import build_lpips
from ov3fast.models.tokenizer import Tokenizer
from ov3fast.recipes.config import Recipe, Stage
from ov3fast.training import build, capture, checkpoint, compare, distributed, plan
from ov3fast.training.announce import announce
from ov3fast.training.capture import CapturedStep
from ov3fast.training.guard import MOST, NonFiniteError, SpikeError, median_if_spike, report
from ov3fast.training.inputs import Inputs
from ov3fast.training.journal import Journal
from ov3fast.training.logs import Display, Window
from ov3fast.training.optimizer import AdamW
from ov3fast.training.parallel import Parallel, whole
from ov3fast.training.progress import (
    COMPARISON,
    MODEL,
    RECIPE,
    SUMMARY,
    TOKENIZER,
    State,
    find_checkpoint,
    restored_state,
)
from ov3fast.training.results import describe_metrics, final_metrics, write_json
from ov3fast.training.saving import Saver
from ov3fast.training.schedule import schedule
from ov3fast.training.signals import Deadline, StopRequest
from ov3fast.training.stage import StageRun, check_micro_batches, length
from ov3fast.training.step import MicroBatch, Step, branches
from ov3fast.training.timing import Timer

EXIT_INTERRUPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that was told to stop and has saved: start the same command again with --resume."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    init_from: str | Path | None = None,
    extend: bool = False,
) -> dict[str, Any]:
    """Runs the recipe, as one process or as torchrun's, and returns the last losses and the run's metrics.

    resume: go on from the newest whole checkpoint in recipe.run_dir; a run_dir without one starts anew. overwrite: a run_dir that holds a
    run is started over, its checkpoints removed. init_from: a model's folder, a run or a hub id, whose weights and tokenizer a new
    run begins with. extend: a resumed run's recipe may have longer stages and more of them (the learning rate follows the new length
    from there on); a run that was complete goes on. Raises FileExistsError where neither is given and there is a run;
    ValueError for a resume with another recipe, naming the field; NonFiniteError; DataError.
    """
    recipe = recipe.resolve()
    ranks = distributed.start(device, timedelta(minutes=recipe.rank_timeout_minutes))
    build.check_same_recipe(recipe, ranks)
    backend = ops.use(recipe.impl) if recipe.impl else nullcontext()
    with backend, StopRequest() as stop, Display(show=ranks.first) as display, naming_full_disk(recipe.run_dir):
        return Run(recipe, ranks, stop, display, extend).start(resume, overwrite, init_from)


class Run:
    """One process's part of a run."""

    def __init__(
        self, recipe: Recipe, ranks: distributed.Ranks, stop: StopRequest, display: Display, extend: bool = False, until: int | None = None
    ) -> None:  # fmt: skip
        """until: the step after which a run that writes nothing ends (training.replay)."""
        self.recipe, self.ranks, self.stop, self.display = recipe, ranks, stop, display
        check_writable_folder(recipe.run_dir, "run_dir")
        check_micro_batches(recipe, ranks.world)
        if recipe.capture:
            capture.check(recipe, ranks)
        if recipe.compile:
            build.check_compiler(ranks.device)
        self.extend, self.until = extend, until
        self.state = State()
        self.timer = Timer(ranks.device, recipe.synchronize_timing)
        self.stopped = False
        self.reactions = 0
        self.deadline = None if recipe.wall_minutes is None else Deadline(60 * recipe.wall_minutes)
        self.saved_at = (0, 0.0)
        self.journal = Journal(recipe, ranks, self.timer, display)

    # ---- the run ----

    def start(self, resume: bool, overwrite: bool, init_from: str | Path | None = None) -> dict[str, Any]:
        recipe, run_dir = self.recipe, self.recipe.run_dir
        saved = find_checkpoint(recipe, self.ranks, self.display.note, resume=resume, overwrite=overwrite, extend=self.extend)
        tokenizer = self.set_up(saved, init_from)
        if not self.interrupted and (run_dir / SUMMARY).is_file():
            self.display.note(f"{run_dir} is complete at step {self.state.step}")
            return json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        if self.ranks.first:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(run_dir / RECIPE, {**recipe.to_dict(), VERSIONS: versions()})
            if saved is None:
                tokenizer.save(run_dir / TOKENIZER)
            self.journal.open(self.state.step)
        counts = self.model.parameter_counts()
        self.display.note(
            f"{self.store.n:,} samples, {counts['total'] / 1e6:.2f} M parameters, vocabulary {tokenizer.vocab_size:,}, "
            f"{self.parallel.describe()} on {self.ranks.device}, {recipe.precision}, run_dir {run_dir}"
        )
        if self.ranks.first:
            stage = min(self.state.stage, len(recipe.stages) - 1)
            for line in announce(recipe, self.parallel, self.optimizer, stage):
                self.display.note(line)
        # Everything made so far lives to the end: freezing it keeps the garbage collector from scanning it every time.
        gc.collect()
        gc.freeze()
        try:
            while self.interrupted and not self.stopped:
                self.train_stage(recipe.stages[self.state.stage])
            return self._finish()
        except BaseException:
            # Let a save in progress finish, but report the run's error.
            with suppress(Exception):
                self.saver.finish()
            raise
        finally:
            gc.unfreeze()
            self.saver.close()
            self.journal.close()

    def set_up(self, saved: checkpoint.Checkpoint | None, init_from: str | Path | None = None) -> Tokenizer:
        """Builds data, model and optimizer, and restores what was saved of them; returns the tokenizer."""
        recipe = self.recipe
        self.display.note(f"recipe {recipe.name}: reading the data")
        self.store = SampleStore(recipe.data)
        initial = None if init_from is None or saved is not None else build.initial_model(init_from)
        tokenizer = build.starting_tokenizer(recipe, self.store, initial, resumed=saved is not None)
        self.model = build.build_model(recipe, tokenizer, self.ranks.device)
        if initial is not None:
            build.load_initial(self.model, initial, init_from)
            self.display.note(f"weights of {initial}")
        self.parallel = Parallel(self.model, recipe, self.ranks)
        self.optimizer = AdamW(self.model, recipe.optimizer)
        self.saver = Saver(recipe.checkpoints, self.ranks, keep=recipe.keep, keep_every=recipe.keep_every)
        if saved is not None:
            self._restore(saved)
        self.timer.watch(
            encoder=self.model.encoder, decoder=self.model.decoder, text=self.model.text, captioner=self.model.captioner
        )
        return tokenizer

    @property
    def interrupted(self) -> bool:
        """Whether any stage is unfinished."""
        return self.state.stage < len(self.recipe.stages)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self.state = restored_state(saved, self.recipe.stages, self.extend)
        for group, tensors in self._tensors().items():
            saved.restore(group, tensors, self.ranks)
        self.optimizer.set_steps(self.state.step - self.state.skipped)
        self.saved_at = (self.state.step, self.state.seconds)
        self.display.note(f"resuming from {saved.folder}")

    # ---- a stage ----

    def train_stage(self, stage: Stage) -> None:
        run = self._prepare(stage)
        while not self.stopped and not run.finished(self.state) and self.state.step != self.until:
            lr = run.lr(self.state)
            micro_batches, samples = run.inputs.next(self.state.stage_step + self.state.batches_left_out)
            if self.state.step == 0 and self.recipe.compare_impl is not None:
                self._compare(run, micro_batches, lr)
            losses, measured = self._forward_backward(run, micro_batches, measure=self._measures())
            stop, bad, median = self._check(run, losses)
            norm = None
            if not bad:
                norm = self._update(run, lr)
                if not bool(norm.isfinite()):  # the norm over all ranks; the update changed nothing
                    losses, bad = {"gradient norm": norm}, True
            if bad and self._react(run, micro_batches, losses, median):
                continue
            self._record(run, losses, None if bad else norm, lr, measured, samples, stop)
            self._checkpoint(run, stop)
        if run.inputs.skips.counts:
            self.display.note(f"skipped samples: {run.inputs.skips}")

    def _prepare(self, stage: Stage) -> StageRun:
        """Sets up a stage at the step that the run resumes from."""
        recipe, state = self.recipe, self.state
        config = recipe.stage_objective(stage)
        lpips = (
            build_lpips(recipe.lpips, self.ranks.device, fetch) if config.lpips_weight > 0 and config.rec_weight > 0 else None
        )
        step: Step | CapturedStep = Step(
            self.parallel, Objective(config, lpips, recipe.contrastive_exchange), self.timer,
            bf16=recipe.precision == "bf16", exact_contrastive=recipe.contrastive_over == "batch",
        )  # fmt: skip
        if recipe.capture:
            step = CapturedStep(step, self.optimizer)
        times = schedule(stage, recipe.optimizer.min_lr)
        inputs = Inputs(recipe, state.stage, config, self.model, self.store, self.ranks, self.timer, state.cursors)
        inputs.prepare(
            lambda done, total: self.display.update(
                f"{stage.name}: latents", done / total, f"{done:,} of {total:,}", last=done == total
            )
        )
        self.display.note(
            f"stage {stage.name}: {stage.image_size} px, {stage.batch_size} images a step, {length(times)}, peak LR {times.peak_lr:.3g}"
        )
        run = StageRun(stage, times, step, inputs, sum(plan.flops_by_part(recipe, stage).values()))
        run.begin(state)
        return run

    def _measures(self) -> bool:
        """Whether this step measures each branch's gradient."""
        every = self.recipe.gradient_norms_every
        return every is not None and self.state.step % every == 0

    def _forward_backward(
        self, run: StageRun, micro_batches: list[MicroBatch], measure: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        # A rank that exchanged other gradients than the rest would hang.
        self.ranks.agree(the_step=self.state.step, **branches(micro_batches))
        self.optimizer.zero_grad()
        return run.step(micro_batches, measure)

    def _check(self, run: StageRun, losses: dict[str, Tensor]) -> tuple[bool, bool, float | None]:
        """(whether any rank was told to stop, whether the update must be skipped, for a spike the median that it exceeds)."""
        fine = bool(torch.stack(list(losses.values())).isfinite().all())
        minutes = (time.monotonic() - run.began) / 60
        if self.deadline is not None:
            self.deadline.note_step(60 * (minutes - run.minutes) if run.minutes else None)
        factor = self.recipe.spike_factor
        loss = float(losses["loss"]) if fine and factor is not None else 0.0
        asked = self.stop.name is not None or self._out_of_time()
        bad, stop, run.minutes, unsaved, worst = self.ranks.largest(not fine, asked, minutes, self.saver.failed, loss)
        if unsaved:
            self.saver.finish()
        median = None if bad or factor is None else median_if_spike(self.state.recent, worst, factor)
        return bool(stop), bool(bad) or median is not None, median

    def _out_of_time(self) -> bool:
        """Whether the job's time is nearly over: what is left is for ending two steps and for a save like the longest so far."""
        out = self.deadline is not None and self.deadline.is_near(self.saver.longest)
        if out:
            self.stop.name = self.stop.name or "wall_minutes"
        return out

    def _update(self, run: StageRun, lr: float) -> Tensor:
        """Clips, updates the weights and their average; returns the gradient's norm."""
        with self.timer("optimizer"):
            self.saver.copied()
            self.optimizer.set_lr(lr)
            run.step.update(self.optimizer)
        return self.optimizer.grad_norm

    def _react(self, run: StageRun, micro_batches: list[MicroBatch], values: dict[str, Tensor], median: float | None) -> bool:
        """Applies recipe.on_spike to a step that changed nothing. Returns whether the run went back to a checkpoint."""
        recipe, state = self.recipe, self.state
        if state.step + 1 == self.until:
            self.journal.row = {"step": self.until, **{name: float(value) for name, value in values.items()}}
            self.stopped = True
            return True
        message = report(
            recipe.run_dir,
            self.ranks,
            run.stage.name,
            state.step,
            self.model,
            micro_batches,
            values,
            run.step.autocast(),
            median,
        )
        self.reactions += 1
        if recipe.on_spike == "abort" or self.reactions > MOST:
            raise (NonFiniteError if median is None else SpikeError)(message)
        self.display.note(message)
        saved = None
        if recipe.on_spike == "rollback":
            self.saver.finish()
            saved = checkpoint.latest(recipe.checkpoints, self.ranks)
        if saved is None or saved.state["progress"]["stage"] != state.stage:
            self.optimizer.set_steps(state.step - state.skipped)
            state.skipped += 1
            return False
        following = state.stage_step + state.batches_left_out + 1
        self._restore(saved)
        self.state.batches_left_out = following - self.state.stage_step
        run.begin(self.state)
        self.journal.reopen(self.state.step)
        return True

    def _record(
        self, run: StageRun, losses: dict[str, Tensor], norm: Tensor | None, lr: float, measured: dict[str, float],
        samples: np.ndarray, stop: bool,
    ) -> None:  # fmt: skip
        """Counts the step and, where a row is due, logs the means since the last. norm: None where there was no update."""
        state = self.state
        state.advance(run.stage.batch_size, 60 * run.minutes, run.before, samples)
        if norm is not None:
            run.window.add(losses, norm, run.stage.batch_size)
        due = state.step % self.recipe.log_every == 0 or measured or stop or run.finished(state)
        if due and run.window.count:
            self.journal.write(run, state, lr, measured, float(self.model.logit_scale.detach().exp()), self.stop)

    def _checkpoint(self, run: StageRun, stop: bool) -> None:
        """Closes the stage if it has finished, and saves a checkpoint if one is due."""
        state = self.state
        last = run.finished(state)
        if last:
            state.end_stage(run.inputs.cursors(state.stage_step + state.batches_left_out))
        if last or stop or self._is_due():
            self._save()
        if stop:
            self.saver.finish()
            self.display.note(f"{self.stop.name or 'a signal to another process'}: saved at step {state.step}, stopping")
        run.done, self.stopped = last, stop

    def _compare(self, run: StageRun, micro_batches: list[MicroBatch], lr: float) -> None:
        """Times the step with another backend, in turn with the chosen ones; the time that this takes doesn't count for the stage."""
        recipe, began, seconds = self.recipe, time.monotonic(), dict(self.timer.seconds)

        def update() -> None:
            self._forward_backward(run, micro_batches)
            self._update(run, lr)

        result = compare.compare(
            update, self.model, self.optimizer, run.stage.batch_size, recipe.compare_impl, recipe.compare_rounds
        )
        self.timer.seconds = seconds
        if self.ranks.first:
            write_json(recipe.run_dir / COMPARISON, result)
            self.display.note(compare.describe(result))
        run.began += time.monotonic() - began
        run.window = Window()

    # ---- what is written ----

    def _is_due(self) -> bool:
        steps, minutes = self.recipe.checkpoint_steps, self.recipe.checkpoint_minutes
        by_steps = steps is not None and self.state.step % steps == 0
        return by_steps or (minutes is not None and self.state.seconds - self.saved_at[1] >= 60 * minutes)

    def _save(self) -> None:
        if self.saved_at[0] == self.state.step or self.until is not None:
            return
        with self.timer("checkpoint"):
            recipe, progress = self.recipe.to_dict(), dataclasses.asdict(self.state)
            state = {"progress": progress, "recipe": recipe, "world": self.ranks.world, **versions()}
            self.saver.save(self.state.step, self._tensors(), state)
        self.saved_at = (self.state.step, self.state.seconds)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds beside the state: group -> name -> tensor."""
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.moments()}
        return tensors if self.optimizer.ema is None else {**tensors, "ema": self.optimizer.ema}

    def _finish(self) -> dict[str, Any]:
        """The final model (its EMA where one is kept) and the summary."""
        metrics = final_metrics(self.recipe, self.state, self.journal.row, self.timer, self.ranks.device, self.interrupted)
        self.saver.finish()
        if not self.interrupted:
            weights = {name: whole(value) for name, value in {**self.model.state_dict(), **(self.optimizer.ema or {})}.items()}
            if self.ranks.first:
                self.model.save_pretrained(self.recipe.run_dir / MODEL, weights)
                write_json(self.recipe.run_dir / SUMMARY, metrics)
                for line in describe_metrics(metrics, self.recipe.run_dir / MODEL):
                    self.display.note(line)
        self.ranks.wait()
        return metrics
