"""The training loop: a recipe's stages as one run.

    from ov3fast.training import train
    metrics = train(recipe)                    # or train(recipe, resume=True)

    runs/demo/  recipe.json  log.jsonl  tensorboard/  checkpoints/step-.../  model/  comparison.json  summary.json

Every step is a function of (recipe, step): sample order, augmentation, noise and sub-batches are counter-based, so a run resumed from
a checkpoint has the same bits as one that was never stopped, in the same layout of processes. (A stage measured in minutes follows the
clock, so its rates are those of the day.) SIGTERM, SIGUSR1 or Ctrl-C: the run saves after the current step and returns with
metrics["interrupted"]; scripts end with EXIT_INTERRUPTED then. A loss that is not finite ends the run before it changes a weight.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ov3fast import ops
from ov3fast.data.assets import fetch
from ov3fast.data.order import order_hash
from ov3fast.data.store import SampleStore
from ov3fast.io import atomic_write, check_writable_folder, naming_full_disk
from ov3fast.losses import Objective
from ov3fast.models import pretrained
from ov3fast.models.config import VERSIONS, versions
from ov3fast.models.openvision3 import WEIGHTS_FILE
from ov3fast.models.perceptual import build_lpips
from ov3fast.models.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from ov3fast.models.tokenizer import FILE as TOKENIZER_FILE
from ov3fast.models.tokenizer import load_tokenizer
from ov3fast.recipes.config import Recipe, Stage
from ov3fast.training import build, capture, checkpoint, compare, distributed
from ov3fast.training.capture import CapturedStep
from ov3fast.training.inputs import Inputs
from ov3fast.training.logs import Display, RunLog, Window, describe
from ov3fast.training.nonfinite import stop_non_finite
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
from ov3fast.training.saving import Saver
from ov3fast.training.schedule import Schedule, schedule
from ov3fast.training.signals import StopRequest
from ov3fast.training.step import MicroBatch, Step
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
    """Runs the recipe, as one process or as torchrun's, and returns the last losses and the run's figures.

    resume: go on from the newest whole checkpoint in recipe.run_dir; a run_dir without one starts anew. overwrite: a run_dir that holds a
    run already is begun again, its checkpoints removed. init_from: a model's folder, a run or a hub id, whose weights and tokenizer a new
    run begins with. extend: a resumed run's recipe may have longer stages and more of them (the learning rate follows the new length
    from there on); a run that was complete goes on. Raises FileExistsError where neither is given and there is a run;
    ValueError for a resume with another recipe, naming the field; NonFiniteError; DataError.
    """
    recipe = recipe.resolve()
    ranks = distributed.start(device)
    backend = ops.use(recipe.impl) if recipe.impl else nullcontext()
    with backend, StopRequest() as stop, Display(show=ranks.first) as display, naming_full_disk(recipe.run_dir):
        return Run(recipe, ranks, stop, display, extend).start(resume, overwrite, init_from)


class Run:
    """One process's part of a run."""

    def __init__(
        self, recipe: Recipe, ranks: distributed.Ranks, stop: StopRequest, display: Display, extend: bool = False
    ) -> None:
        self.recipe, self.ranks, self.stop, self.display = recipe, ranks, stop, display
        check_writable_folder(recipe.run_dir, "run_dir")
        check_micro_batches(recipe, ranks.world)
        if recipe.capture:
            capture.check(recipe, ranks)
        if recipe.compile:
            build.check_compiler(ranks.device)
        self.extend = extend
        self.state = State()
        self.timer = Timer(ranks.device, recipe.synchronize_timing)
        self.stopped = False
        self.saved_at = (0, 0.0)
        self.row: dict[str, Any] = {}

    # ---- the run ----

    def start(self, resume: bool, overwrite: bool, init_from: str | Path | None = None) -> dict[str, Any]:
        recipe, run_dir = self.recipe, self.recipe.run_dir
        saved = find_checkpoint(recipe, self.ranks, self.display.note, resume=resume, overwrite=overwrite, extend=self.extend)
        self.display.note(f"recipe {recipe.name}: reading the data")
        self.store = SampleStore(recipe.data)
        initial = None if init_from is None or saved is not None else _model_folder(init_from)
        if saved is not None:
            tokenizer = load_tokenizer(run_dir / TOKENIZER)
        elif initial is not None and (initial / TOKENIZER_CONFIG).is_file():
            tokenizer = load_tokenizer(initial)
        else:
            tokenizer = build.build_tokenizer(recipe, self.store)
        self.model = build.build_model(recipe, tokenizer, self.ranks.device)
        if initial is not None:
            what = f"init_from {init_from}"
            pretrained.load_state(self.model, pretrained.read_tensors(initial / WEIGHTS_FILE, what), what)
            self.display.note(f"weights of {initial}")
        self.parallel = Parallel(self.model, recipe, self.ranks)
        self.optimizer = AdamW(self.model, recipe.optimizer)
        self.saver = Saver(recipe.checkpoints, self.ranks, keep=recipe.keep, keep_every=recipe.keep_every)
        if saved is not None:
            self._restore(saved)
        if not self.interrupted and (run_dir / SUMMARY).is_file():
            self.display.note(f"{run_dir} is complete at step {self.state.step}")
            return json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        self.timer.watch(
            encoder=self.model.encoder, decoder=self.model.decoder, text=self.model.text, captioner=self.model.captioner
        )
        self.log = None
        if self.ranks.first:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(run_dir / RECIPE, {**recipe.to_dict(), VERSIONS: versions()})
            if saved is None:
                tokenizer.save(run_dir / TOKENIZER)
            self.log = RunLog(run_dir, after=self.state.step)
        counts = self.model.parameter_counts()
        self.display.note(
            f"{self.store.n:,} samples, {counts['total'] / 1e6:.2f} M parameters, vocabulary {tokenizer.vocab_size:,}, "
            f"{self.ranks.world} process(es) on {self.ranks.device}, {recipe.precision}, run_dir {run_dir}"
        )
        # What set-up made stays to the end: the collector need not go through it in every one of its rounds.
        gc.collect()
        gc.freeze()
        try:
            while self.interrupted and not self.stopped:
                self._stage(recipe.stages[self.state.stage])
            return self._finish()
        except BaseException:
            # A save that is under way ends first; the run's error is the one to be told.
            with suppress(Exception):
                self.saver.finish()
            raise
        finally:
            gc.unfreeze()
            self.saver.close()
            if self.log is not None:
                self.log.close()

    @property
    def interrupted(self) -> bool:
        """Whether any stage is unfinished."""
        return self.state.stage < len(self.recipe.stages)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self.state = restored_state(saved, self.recipe.stages, self.extend)
        for group, tensors in self._tensors().items():
            saved.restore(group, tensors, self.ranks)
        self.optimizer.set_steps(self.state.step)
        self.saved_at = (self.state.step, self.state.seconds)
        self.display.note(f"resuming from {saved.folder}")

    # ---- a stage ----

    def _stage(self, stage: Stage) -> None:
        run = self._prepare(stage)
        while not self.stopped and not run.finished(self.state):
            lr = run.lr(self.state)
            micro_batches, samples = run.inputs.next(self.state.stage_step)
            if self.state.step == 0 and self.recipe.compare_impl is not None:
                self._compare(run, micro_batches, lr)
            losses, measured = self._forward_backward(run, micro_batches, measure=self._measures())
            stop = self._check(run, micro_batches, losses)
            norm = self._update(run, lr)
            self._check_norm(run, micro_batches, norm)
            self._record(run, losses, norm, lr, measured, samples, stop)
            self._checkpoint(run, stop)
        if run.inputs.skips.counts:
            self.display.note(f"skipped samples: {run.inputs.skips}")

    def _prepare(self, stage: Stage) -> _StageRun:
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
        inputs.start(state.stage_step, times.steps)
        self.display.note(
            f"stage {stage.name}: {stage.image_size} px, {stage.batch_size} images a step, {_length(times)}, peak LR {times.peak_lr:.3g}"
        )
        return _StageRun(
            stage, times, step, inputs, time.monotonic() - state.stage_seconds, state.seconds - state.stage_seconds
        )

    def _measures(self) -> bool:
        """Whether this step measures each branch's gradient."""
        every = self.recipe.gradient_norms_every
        return every is not None and self.state.step % every == 0

    def _forward_backward(
        self, run: _StageRun, micro_batches: list[MicroBatch], measure: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        self.optimizer.zero_grad()
        return run.step(micro_batches, measure)

    def _check(self, run: _StageRun, micro_batches: list[MicroBatch], losses: dict[str, Tensor]) -> bool:
        """NonFiniteError where a loss of any rank is not finite. Returns whether any rank was told to stop."""
        fine = bool(torch.stack(list(losses.values())).isfinite().all())
        minutes = (time.monotonic() - run.began) / 60
        bad, stop, run.minutes, unsaved = self.ranks.largest(not fine, self.stop.name is not None, minutes, self.saver.failed)
        if unsaved:
            self.saver.finish()
        if bad:
            self._stop_non_finite(run, micro_batches, losses)
        return bool(stop)

    def _update(self, run: _StageRun, lr: float) -> Tensor:
        """Clips, updates the weights and their average; returns the gradient's norm."""
        with self.timer("optimizer"):
            self.saver.copied()
            self.optimizer.set_lr(lr)
            run.step.update(self.optimizer)
        return self.optimizer.grad_norm

    def _check_norm(self, run: _StageRun, micro_batches: list[MicroBatch], norm: Tensor) -> None:
        """NonFiniteError where the norm, which is all ranks' own, is not finite: that update changed nothing."""
        if not bool(norm.isfinite()):
            self._stop_non_finite(run, micro_batches, {"gradient norm": norm})

    def _stop_non_finite(self, run: _StageRun, micro_batches: list[MicroBatch], values: dict[str, Tensor]) -> NoReturn:
        stop_non_finite(
            self.recipe.run_dir, self.ranks.rank, run.stage.name, self.state.step, self.model, micro_batches, values,
            run.step.autocast(),
        )  # fmt: skip

    def _record(
        self,
        run: _StageRun,
        losses: dict[str, Tensor],
        norm: Tensor,
        lr: float,
        measured: dict[str, float],
        samples: np.ndarray,
        stop: bool,
    ) -> None:
        """Counts the step and, where a row is due, logs the means since the last."""
        state = self.state
        state.step += 1
        state.stage_step += 1
        state.images += run.stage.batch_size
        state.stage_seconds, state.seconds = 60 * run.minutes, run.before + 60 * run.minutes
        state.order_hash = order_hash(state.order_hash, samples.tolist())
        run.window.add(losses, norm, run.stage.batch_size)
        if state.step % self.recipe.log_every == 0 or measured or stop or run.finished(state):
            self._log(run, lr, measured)

    def _checkpoint(self, run: _StageRun, stop: bool) -> None:
        """Closes the stage if it has finished, and saves a checkpoint if one is due."""
        state = self.state
        last = run.finished(state)
        if last:
            state.ended = {
                "stage_step": state.stage_step, "stage_seconds": state.stage_seconds, "cursors": state.cursors,
            }  # fmt: skip
            state.cursors = run.inputs.cursors(state.stage_step)
            state.stage, state.stage_step, state.stage_seconds = state.stage + 1, 0, 0.0
        if last or stop or self._is_due():
            self._save()
        if stop:
            self.saver.finish()
            self.display.note(f"{self.stop.name or 'a signal to another process'}: saved at step {state.step}, stopping")
        run.done, self.stopped = last, stop

    def _compare(self, run: _StageRun, micro_batches: list[MicroBatch], lr: float) -> None:
        """Times the step with another backend, in turn with the chosen ones; the seconds that it takes are not the stage's."""
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
        if self.saved_at[0] == self.state.step:
            return
        with self.timer("checkpoint"):
            state = {
                "progress": dataclasses.asdict(self.state),
                "recipe": self.recipe.to_dict(),
                "world": self.ranks.world,
                **versions(),
            }
            self.saver.save(self.state.step, self._tensors(), state)
        self.saved_at = (self.state.step, self.state.seconds)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds beside the state: group -> name -> tensor."""
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.moments()}
        return tensors if self.optimizer.ema is None else {**tensors, "ema": self.optimizer.ema}

    def _log(self, run: _StageRun, lr: float, measured: dict[str, float]) -> None:
        state = self.state
        names, values, rate = run.window.take()
        means = (self.ranks.total(values) / self.ranks.world).tolist()
        self.row = {
            "step": state.step,
            "stage": run.stage.name,
            "images": state.images,
            "seconds": round(state.seconds, 3),
            "images_per_s": rate,
            "lr": lr,
            **dict(zip(names, means, strict=True)),
            "logit_scale": float(self.model.logit_scale.detach().exp()),
            **measured,
        }
        if self.log is not None:
            self.log.write(self.row)
        last = run.finished(state)
        share = 1.0 if last else run.times.progress(state.stage_step, run.minutes)
        eta = 60 * run.minutes * (1 - share) / share if share > 0 else None
        try:
            self.display.update(run.stage.name, share, describe(self.row, eta), last)
        except BrokenPipeError:  # the reader of the output went away: as on a signal, what was trained is saved
            self.stop.name = self.stop.name or "SIGPIPE"

    def _finish(self) -> dict[str, Any]:
        """The final model (its EMA where one is kept) and the summary."""
        state, seconds = self.state, self.timer.table()
        metrics = {
            **{key: value for key, value in self.row.items() if key not in ("step", "images", "seconds", "stage")},
            "step": state.step,
            "images": state.images,
            "seconds": state.seconds,
            "interrupted": self.interrupted,
            "order_hash": state.order_hash,
            "seconds_by_part": seconds,
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if (self.recipe.run_dir / COMPARISON).is_file():
            metrics["comparison"] = json.loads((self.recipe.run_dir / COMPARISON).read_text(encoding="utf-8"))
        if self.ranks.device.type == "cuda":
            metrics["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        self.saver.finish()
        if not self.interrupted:
            self._export()
        if self.interrupted or not self.ranks.first:
            self.ranks.wait()
            return metrics
        write_json(self.recipe.run_dir / SUMMARY, metrics)
        total = sum(seconds.values()) or 1.0
        for part, value in seconds.items():
            self.display.note(f"  {part:<14} {value:9.1f} s  {100 * value / total:5.1f} %")
        if "comparison" in metrics:
            self.display.note(compare.describe(metrics["comparison"]))
        self.display.note(f"done: {state.step} steps, {state.images:,} images; model in {self.recipe.run_dir / MODEL}")
        self.ranks.wait()
        return metrics

    def _export(self) -> None:
        weights = {name: whole(value) for name, value in {**self.model.state_dict(), **(self.optimizer.ema or {})}.items()}
        if self.ranks.first:
            self.model.save_pretrained(self.recipe.run_dir / MODEL, weights)


@dataclass
class _StageRun:
    """A stage while it runs."""

    stage: Stage
    times: Schedule
    step: Step | CapturedStep
    inputs: Inputs
    began: float
    """When the stage would have begun, had it never been stopped: time.monotonic() less its seconds so far."""
    before: float
    """Seconds of the stages before."""
    minutes: float = 0.0
    """Of the stage, as all ranks see them."""
    done: bool = False

    def __post_init__(self) -> None:
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


def _length(times: Schedule) -> str:
    return f"{times.steps:,} steps" if times.steps is not None else f"{times.minutes:g} minutes"


def _model_folder(path: str | Path) -> Path:
    what = f"init_from {path}"
    found = pretrained.resolve(path, what, ["config.json", WEIGHTS_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG])
    return pretrained.model_folder(found, what)


def write_json(path: Path, values: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
