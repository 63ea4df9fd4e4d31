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
import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast import ops
from ov3fast.data.order import order_hash
from ov3fast.data.store import SampleStore
from ov3fast.losses import Objective
from ov3fast.models.tokenizer import load_tokenizer
from ov3fast.recipes.config import Recipe, Stage
from ov3fast.training import build, checkpoint, compare, distributed
from ov3fast.training.guard import stop_non_finite
from ov3fast.training.inputs import Inputs
from ov3fast.training.logs import Display, RunLog, describe
from ov3fast.training.optimizer import AdamW, copy
from ov3fast.training.schedule import Schedule, schedule
from ov3fast.training.signals import StopRequest
from ov3fast.training.step import Step
from ov3fast.training.timing import Timer

EXIT_INTERRUPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that was told to stop and has saved: start the same command again with --resume."""

RECIPE, SUMMARY, CHECKPOINTS, TOKENIZER, MODEL = "recipe.json", "summary.json", "checkpoints", "tokenizer", "model"
COMPARISON = "comparison.json"


@dataclass
class State:
    """Where a run is; with weights, optimizer and EMA it is all that a checkpoint needs."""

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
    order_hash: str = ""
    """Running sha256 of the samples' numbers, in order."""


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, device: str | torch.device | None = None
) -> dict[str, Any]:
    """Runs the recipe, as one process or as torchrun's, and returns the last losses and the run's figures.

    resume: go on from the newest whole checkpoint in recipe.run_dir; a run_dir without one starts anew. overwrite: a run_dir that holds a
    run already is begun again, its checkpoints removed. Raises FileExistsError where neither is given and there is a run;
    ValueError for a resume with another recipe, naming the field; NonFiniteError; DataError.
    """
    recipe = recipe.resolve()
    ranks = distributed.start(device)
    backend = ops.use(recipe.impl) if recipe.impl else nullcontext()
    with backend, StopRequest() as stop, Display(show=ranks.first) as display:
        return Run(recipe, ranks, stop, display).start(resume, overwrite)


class Run:
    """One process's part of a run."""

    def __init__(self, recipe: Recipe, ranks: distributed.Ranks, stop: StopRequest, display: Display) -> None:
        self.recipe, self.ranks, self.stop, self.display = recipe, ranks, stop, display
        self.slices = ranks.world * recipe.accumulate
        check_slices(recipe, ranks.world)
        if recipe.compile:
            build.check_compiler(ranks.device)
        self.state = State()
        self.timer = Timer(ranks.device, recipe.synchronize_timing)
        self.stopped = False
        self.saved_at = (0, 0.0)
        self.row: dict[str, Any] = {}

    # ---- the run ----

    def start(self, resume: bool, overwrite: bool) -> dict[str, Any]:
        recipe, run_dir = self.recipe, self.recipe.run_dir
        saved = self._find_checkpoint(resume, overwrite)
        self.display.note(f"recipe {recipe.name}: reading the data")
        self.store = SampleStore(recipe.data)
        tokenizer = build.build_tokenizer(recipe, self.store) if saved is None else load_tokenizer(run_dir / TOKENIZER)
        self.model = build.build_model(recipe, tokenizer, self.ranks.device)
        self.optimizer = AdamW(self.model, recipe.optimizer)
        if saved is not None:
            self._restore(saved)
        if not self.interrupted and (run_dir / SUMMARY).is_file():
            self.display.note(f"{run_dir} is complete at step {self.state.step}")
            return json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        self.runner = self._runner()
        self.timer.watch(
            encoder=self.model.encoder, decoder=self.model.decoder, text=self.model.text, captioner=self.model.captioner
        )
        self.log = None
        if self.ranks.first:
            run_dir.mkdir(parents=True, exist_ok=True)
            _write_json(run_dir / RECIPE, recipe.to_dict())
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
        finally:
            gc.unfreeze()
            if self.log is not None:
                self.log.close()

    @property
    def interrupted(self) -> bool:
        """Whether stages are left."""
        return self.state.stage < len(self.recipe.stages)

    def _find_checkpoint(self, resume: bool, overwrite: bool) -> checkpoint.Checkpoint | None:
        folder = self.recipe.run_dir / CHECKPOINTS
        present = checkpoint.steps(folder)
        self.ranks.wait()
        if not resume and present:
            if not overwrite:
                raise FileExistsError(
                    f"run_dir: {self.recipe.run_dir} holds a run that got to step {present[-1]}; resume it, overwrite it, or name another run_dir"
                )
            if self.ranks.first:
                for name in (CHECKPOINTS, TOKENIZER, MODEL):
                    shutil.rmtree(self.recipe.run_dir / name, ignore_errors=True)
                (self.recipe.run_dir / COMPARISON).unlink(missing_ok=True)
            self.ranks.wait()
        if not resume:
            return None
        saved = checkpoint.latest(folder)
        if saved is None:
            self.display.note(f"no checkpoint in {folder}: starting from the beginning")
            return None
        difference = self.recipe.difference(saved.state["recipe"])
        if difference is not None:
            raise ValueError(f"resume: {saved.path} is of another recipe ({difference}); use its recipe or another run_dir")
        if saved.state["world"] != self.ranks.world:
            self.display.note(
                f"resuming a run of {saved.state['world']} process(es) with {self.ranks.world}: the same samples, not the same bits"
            )
        if saved.state["torch"] != torch.__version__:
            self.display.note(f"saved by torch {saved.state['torch']}, this is {torch.__version__}: bits may differ")
        return saved

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        values = saved.state["progress"]
        cursors = values["cursors"]
        self.state = State(**{**values, "cursors": None if cursors is None else tuple(cursors)})
        copy(self.model.state_dict(), saved.tensors["model"], "model")
        self.optimizer.load(saved.tensors["optimizer"], saved.tensors.get("ema"), self.state.step)
        self.saved_at = (self.state.step, self.state.seconds)
        self.display.note(f"resuming from {saved.path}")

    def _runner(self) -> torch.nn.Module:
        if self.ranks.group is None:
            return self.model
        objective = self.recipe.objective
        all_used = min(objective.rec_weight, objective.und_weight, objective.caption_weight, objective.contrastive_weight) > 0
        return torch.nn.parallel.DistributedDataParallel(
            self.model,
            device_ids=[self.ranks.device.index] if self.ranks.device.type == "cuda" else None,
            process_group=self.ranks.group,
            gradient_as_bucket_view=True,
            find_unused_parameters=not all_used,
        )

    # ---- a stage ----

    def _stage(self, stage: Stage) -> None:
        recipe, ranks, state = self.recipe, self.ranks, self.state
        config = recipe.stage_objective(stage)
        lpips = build.build_lpips(recipe.lpips, ranks.device) if config.lpips_weight > 0 and config.rec_weight > 0 else None
        objective = Objective(config, lpips)
        step = Step(
            self.model, self.runner, objective, ranks, self.timer,
            bf16=recipe.precision == "bf16", exact_contrastive=recipe.contrastive_over == "batch",
        )  # fmt: skip
        times = schedule(stage, recipe.optimizer.min_lr)
        inputs = Inputs(recipe, state.stage, config, self.model, self.store, ranks, self.timer, state.cursors)
        inputs.prepare(
            lambda done, total: self.display.update(
                f"{stage.name}: latents", done / total, f"{done:,} of {total:,}", last=done == total
            )
        )
        inputs.start(state.stage_step, times.steps)
        self.display.note(
            f"stage {stage.name}: {stage.image_size} px, {stage.batch_size} images a step, {_length(times)}, peak LR {times.peak_lr:.3g}"
        )
        began = time.monotonic() - state.stage_seconds
        before = state.seconds - state.stage_seconds
        window = _Window()
        minutes = state.stage_seconds / 60
        while not times.finished(state.stage_step, minutes):
            lr = times.lr(state.stage_step, minutes)
            slices, samples = inputs.take(state.stage_step)
            measure = recipe.gradient_norms_every is not None and state.step % recipe.gradient_norms_every == 0
            if state.step == 0 and recipe.compare_impl is not None:
                began += self._compare(partial(self._update, step, slices, lr), stage.batch_size)
                window = _Window()
            self.optimizer.zero_grad()
            losses, measured = step(slices, measure)
            norm = self.optimizer.grad_norm()
            fine = bool(torch.stack([*losses.values(), norm.to(losses["loss"].dtype)]).isfinite().all())
            bad, stop, minutes = ranks.largest(not fine, self.stop.name is not None, (time.monotonic() - began) / 60)
            if bad:
                values = {**losses, "gradient norm": norm}
                stop_non_finite(recipe.run_dir, ranks.rank, stage.name, state.step, self.model, slices, values, step.autocast())
            with self.timer("optimizer"):
                self.optimizer.step(lr)

            state.step += 1
            state.stage_step += 1
            state.images += stage.batch_size
            state.stage_seconds, state.seconds = 60 * minutes, before + 60 * minutes
            state.order_hash = order_hash(state.order_hash, samples.tolist())
            window.add(losses, norm, stage.batch_size)
            last = times.finished(state.stage_step, minutes)
            if state.step % recipe.log_every == 0 or measured or last or stop:
                self._log(stage, times, window, lr, measured, minutes, last)
            if last:
                state.cursors = inputs.cursors(state.stage_step)
                state.stage, state.stage_step, state.stage_seconds = state.stage + 1, 0, 0.0
            if last or stop or self._is_due():
                self._save()
            if stop:
                self.display.note(f"{self.stop.name or 'a signal to another process'}: saved at step {state.step}, stopping")
            if last or stop:
                self.stopped = bool(stop)
                break
        if inputs.skips.counts:
            self.display.note(f"skipped samples: {inputs.skips}")

    def _update(self, step: Step, slices: list, lr: float) -> None:
        """A whole step without its checks and records."""
        self.optimizer.zero_grad()
        step(slices, False)
        self.optimizer.grad_norm()
        self.optimizer.step(lr)

    def _compare(self, update: Callable[[], None], images: int) -> float:
        """Times the step with another backend, and returns the seconds that took: they are not the stage's."""
        began, parts = time.monotonic(), dict(self.timer.seconds)
        result = compare.compare(
            update, self.model, self.optimizer, images, self.recipe.compare_impl, self.recipe.compare_rounds
        )
        self.timer.seconds = parts
        if self.ranks.first:
            _write_json(self.recipe.run_dir / COMPARISON, result)
            self.display.note(compare.describe(result))
        return time.monotonic() - began

    # ---- what is written ----

    def _is_due(self) -> bool:
        steps, minutes = self.recipe.checkpoint_steps, self.recipe.checkpoint_minutes
        by_steps = steps is not None and self.state.step % steps == 0
        return by_steps or (minutes is not None and self.state.seconds - self.saved_at[1] >= 60 * minutes)

    def _save(self) -> None:
        if self.saved_at[0] == self.state.step:
            return
        with self.timer("checkpoint"):
            if self.ranks.first:
                tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state()}
                if self.optimizer.ema is not None:
                    tensors["ema"] = self.optimizer.ema
                state = {
                    "progress": dataclasses.asdict(self.state),
                    "recipe": self.recipe.to_dict(),
                    "world": self.ranks.world,
                    "torch": torch.__version__,
                }
                checkpoint.save(self.recipe.run_dir / CHECKPOINTS, self.state.step, tensors, state, self.recipe.keep)
            self.ranks.wait()
        self.saved_at = (self.state.step, self.state.seconds)

    def _log(
        self, stage: Stage, times: Schedule, window: _Window, lr: float, measured: dict[str, float], minutes: float, last: bool
    ) -> None:
        state = self.state
        names, values, rate = window.take()
        means = (self.ranks.total(values) / self.ranks.world).tolist()
        self.row = {
            "step": state.step,
            "stage": stage.name,
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
        share = 1.0 if last else times.progress(state.stage_step, minutes)
        eta = 60 * minutes * (1 - share) / share if share > 0 else None
        self.display.update(stage.name, share, describe(self.row, eta), last)

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
        if self.interrupted or not self.ranks.first:
            self.ranks.wait()
            return metrics
        self._export()
        _write_json(self.recipe.run_dir / SUMMARY, metrics)
        total = sum(seconds.values()) or 1.0
        for part, value in seconds.items():
            self.display.note(f"  {part:<14} {value:9.1f} s  {100 * value / total:5.1f} %")
        if "comparison" in metrics:
            self.display.note(compare.describe(metrics["comparison"]))
        self.display.note(f"done: {state.step} steps, {state.images:,} images; model in {self.recipe.run_dir / MODEL}")
        self.ranks.wait()
        return metrics

    @torch.no_grad()
    def _export(self) -> None:
        ema, live = self.optimizer.ema, self.optimizer.parameters
        kept = None
        if ema is not None:
            kept = {name: p.detach().clone() for name, p in live.items()}
            copy(live, ema, "ema")
        self.model.save_pretrained(self.recipe.run_dir / MODEL)
        if kept is not None:
            copy(live, kept, "model")


class _Window:
    """Losses since the last row of the log."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.names: list[str] = []
        self.sum: Tensor | None = None
        self.count, self.images, self.began = 0, 0, time.monotonic()

    def add(self, losses: dict[str, Tensor], norm: Tensor, images: int) -> None:
        values = torch.stack([*losses.values(), norm.to(losses["loss"].dtype)])
        self.names = [*losses, "grad_norm"]
        self.sum = values if self.sum is None else self.sum + values
        self.count += 1
        self.images += images

    def take(self) -> tuple[list[str], Tensor, float]:
        """Names, means (CPU) and images per second; then empty."""
        names, means = self.names, (self.sum / self.count).cpu()
        rate = self.images / max(time.monotonic() - self.began, 1e-9)
        self._begin()
        return names, means, rate


def check_slices(recipe: Recipe, world: int) -> None:
    """ValueError where a stage's batch or sub-batches can't be shared evenly by processes and micro-batches."""
    slices = world * recipe.accumulate
    for stage in recipe.stages:
        for name in ("batch_size", "latent_images", "pixel_images", "caption_images"):
            value = getattr(stage, name)
            if value is not None and value % slices:
                raise ValueError(
                    f"stage {stage.name!r}: {name} {value} is not divisible by {world} process(es) x {recipe.accumulate} micro-batch(es)"
                )


def _length(times: Schedule) -> str:
    return f"{times.steps:,} steps" if times.steps is not None else f"{times.minutes:g} minutes"


def _write_json(path: Path, values: Any) -> None:
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
