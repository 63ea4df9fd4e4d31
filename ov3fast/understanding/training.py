"""Multi-stage training as in LLaVA: the tower stays frozen; first the projector is trained, then the language model with it.

The rows of a step depend only on (seed, stage, epoch), so an interrupted run resumes bit-exactly. Single process. A run folder
holds

    recipe.json  log.jsonl  checkpoint/ (weights, moments, progress)  model/ (what `ov3fast answer` loads)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast.data import hash_rng
from ov3fast.io import naming_full_disk
from ov3fast.recipes.config import OptimizerConfig
from ov3fast.recipes.understand import UnderstandRecipe, UnderstandStage
from ov3fast.training.logs import Display, RunLog, StepRows
from ov3fast.training.optimizer import AdamW, copy
from ov3fast.training.run_folder import CHECKPOINT, check_run_dir, load_checkpoint, save_checkpoint, start_run
from ov3fast.training.schedule import Schedule
from ov3fast.training.signals import StopRequest
from ov3fast.understanding.batches import Batch, collate, rows_of_epoch
from ov3fast.understanding.conversations import IGNORED, Conversation, Encoder, Example, read_conversations
from ov3fast.understanding.lora import add_lora, merge_lora
from ov3fast.understanding.model import Understander, build_language_model
from ov3fast.understanding.saved import MODEL, Answerer, opened
from ov3fast.understanding.towers import Tower, load_tower

MAY_CHANGE = ("checkpoint_every", "log_every", "run_dir")
"""Recipe fields that may change when a run is resumed."""
ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class Source:
    """A stage's conversations, and a function that loads an image they name as uint8 [3, S, S], preprocessed for the tower."""

    conversations: list[Conversation]
    view: Callable[[str], Tensor]


def source_of(stage: UnderstandStage, tower: Tower) -> Source:
    """The source for a stage's file and image folder. FileNotFoundError or ValueError if they are missing or invalid."""
    folder = Path(stage.images).expanduser()
    if stage.images and not folder.is_dir():
        raise FileNotFoundError(f"stage {stage.name!r}: no folder of images {folder}")
    return Source(read_conversations(stage.data), lambda name: tower.view(opened(folder / name)))


class Features:
    """Tower features by image name; with `cached`, every image goes through the tower only once."""

    def __init__(self, tower: Tower, view: Callable[[str], Tensor], cached: bool) -> None:
        self.tower, self.view = tower, view
        self._kept: dict[str, Tensor] | None = {} if cached else None

    def encode(self, names: Sequence[str], display: Display) -> None:
        """Fills the cache."""
        missing = [name for name in dict.fromkeys(names) if self._kept is not None and name not in self._kept]
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            part = missing[start : start + ENCODED_AT_ONCE]
            assert self._kept is not None
            self._kept.update(zip(part, self._of(part).cpu(), strict=True))
            display.update("encode", (start + len(part)) / len(missing), f"{start + len(part)} of {len(missing)} images")

    def __call__(self, names: Sequence[str]) -> Tensor | None:
        """[len(names), N, D]; None if there are no names."""
        if not names:
            return None
        return self._of(names) if self._kept is None else torch.stack([self._kept[name] for name in names])

    def _of(self, names: Sequence[str]) -> Tensor:
        return self.tower.features(torch.stack([self.view(name) for name in names]))


@dataclass
class Progress:
    """Progress of a run. step: steps completed over all stages; place: rows of the current epoch already used."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    epoch: int = 0
    place: int = 0


class Trainer:
    """A model and its current stage: `step()` performs one update, determined by the saved state and the step number."""

    def __init__(
        self, recipe: UnderstandRecipe, model: Understander, tokenizer: Any, tower: Tower, sources: list[Source]
    ) -> None:
        self.recipe, self.model, self.tokenizer, self.tower, self.sources = recipe, model, tokenizer, tower, sources
        self.progress = Progress()
        self.left_out = 0
        self._begin()

    @property
    def finished(self) -> bool:
        return self.progress.stage == len(self.recipe.stages)

    @property
    def stage(self) -> UnderstandStage:
        return self.recipe.stages[self.progress.stage]

    def _begin(self) -> None:
        """Sets up the current stage."""
        recipe, stage, source = self.recipe, self.stage, self.sources[self.progress.stage]
        image_tokens = self.tower.tokens if recipe.sighted and stage.trains != "language_model" else 0
        encoder = Encoder(self.tokenizer, stage.template or recipe.template, image_tokens)
        found = [encoder(conversation, stage.max_length) for conversation in source.conversations]
        self.examples: list[Example] = [one for one in found if one is not None]
        self.left_out = len(found) - len(self.examples)
        if not self.examples:
            raise ValueError(
                f"stage {stage.name!r}: none of its {len(found)} conversations has an answer within {stage.max_length} tokens (max_length)"
            )
        self.features = Features(self.tower, source.view, recipe.cache_features)
        self._rows_of: tuple[int, list[list[int]]] = (-1, [])
        per_epoch = math.ceil(len(self._rows(0)) / stage.batch_size)
        self.steps = stage.steps if stage.steps is not None else max(1, round((stage.epochs or 0) * per_epoch))
        self.schedule = Schedule(stage.lr, 0.0, self.steps, None, round(stage.warmup * self.steps), None)
        self.model.requires_grad_(False)
        self.model.projector.requires_grad_(stage.trains != "language_model" and recipe.sighted)
        if stage.trains == "lora":
            with torch.random.fork_rng([]):
                torch.manual_seed(recipe.seed + 1)
                add_lora(self.model.language_model, recipe.lora_rank, recipe.lora_alpha)
        elif stage.trains != "projector" or not recipe.sighted:
            # The control has no projector: its language model is trained here instead, so that it takes the same steps.
            self.model.language_model.requires_grad_(True)
        config = OptimizerConfig(betas=(0.9, 0.999), weight_decay=stage.weight_decay, clip_norm=recipe.clip_norm)
        self.optimizer = AdamW(self.model, config)

    def _rows(self, epoch: int) -> list[list[int]]:
        if self._rows_of[0] != epoch:
            stage, lengths = self.stage, [len(one.ids) for one in self.examples]
            self._rows_of = epoch, rows_of_epoch(
                lengths, epoch, seed=self.recipe.seed, stage=self.progress.stage, packed=stage.packed, max_length=stage.max_length
            )  # fmt: skip
        return self._rows_of[1]

    def step(self) -> dict[str, float]:
        """RuntimeError if the gradient is not finite; nothing has been updated then."""
        stage, progress, device = self.stage, self.progress, self.model.device
        rows = self._rows(progress.epoch)[progress.place : progress.place + stage.batch_size]
        answers = sum(label != IGNORED for row in rows for number in row for label in self.examples[number].labels)
        size = stage.micro_batch or len(rows)
        total, images = torch.zeros((), device=device), 0
        self.optimizer.zero_grad()
        with torch.random.fork_rng([]):
            # For language models with dropout.
            torch.manual_seed(int(hash_rng.bits(self.recipe.seed, hash_rng.ORDER, progress.step) >> 1))
            for start in range(0, len(rows), size):
                batch = collate([[self.examples[number] for number in row] for row in rows[start : start + size]])
                loss = self._loss(batch, device) / answers
                loss.backward()
                total += loss.detach()
                images += len(batch.images)
        lr = self.schedule.lr(progress.stage_step)
        self.optimizer.set_lr(lr)
        self.optimizer.step()
        norm = float(self.optimizer.grad_norm)
        if not math.isfinite(norm):
            raise RuntimeError(
                f"understanding: the gradient of step {progress.step + 1} is not finite; try a smaller lr or --precision fp32"
            )
        progress.step, progress.stage_step, progress.place = (
            progress.step + 1,
            progress.stage_step + 1,
            progress.place + len(rows),
        )
        if progress.place == len(self._rows(progress.epoch)):
            progress.epoch, progress.place = progress.epoch + 1, 0
        return {"loss": float(total), "grad_norm": norm, "lr": lr, "images": images, "answers": answers}

    def _loss(self, batch: Batch, device: torch.device) -> Tensor:
        features = self.features(batch.images)
        moved = batch._replace(**{name: getattr(batch, name).to(device) for name in ("ids", "labels", "positions", "mask")})
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return self.model.loss(moved, None if features is None else features.to(device))

    def end_stage(self) -> None:
        """Moves on to the next stage, if any."""
        merge_lora(self.model.language_model)
        progress = self.progress
        progress.stage, progress.stage_step, progress.epoch, progress.place = progress.stage + 1, 0, 0, 0
        if not self.finished:
            self._begin()

    def save(self, folder: Path) -> None:
        moments = {} if self.finished else self.optimizer.moments()
        save_checkpoint(folder, {"weights": dict(self.model.named_parameters()), "moments": moments}, asdict(self.progress))

    def load(self, folder: Path) -> None:
        """Restores a saved run of the same recipe. ValueError names what doesn't match."""
        groups, progress = load_checkpoint(folder)
        self.progress = Progress(**progress)
        if not self.finished:
            self._begin()
        copy(dict(self.model.named_parameters()), groups["weights"], "understanding")
        if not self.finished:
            self.optimizer.load(groups["moments"], None, self.progress.stage_step)

    def answerer(self) -> Answerer:
        recipe = self.recipe
        about = {
            "tower": recipe.tower,
            "vae": recipe.vae,
            "feature_layer": recipe.feature_layer,
            "image_aspect": recipe.image_aspect,
            "template": recipe.template,
            "image_tokens": self.tower.tokens if recipe.sighted else 0,
            "feature_width": self.tower.width,
        }
        return Answerer(self.model.eval(), self.tokenizer, about, self.tower)


def train_understanding(
    recipe: UnderstandRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    tower: Tower | None = None,
    sources: list[Source] | None = None,
) -> bool:
    """Runs a recipe to completion in recipe.run_dir; False if a signal stopped it early (its state is saved).

    resume: continue the run in recipe.run_dir, or start one if there is none; errors as in `check_run_dir`. tower, sources:
    used instead of those the recipe names.
    """
    run_dir = recipe.run_dir
    resumed = check_run_dir(recipe, resume=resume, overwrite=overwrite, may_change=MAY_CHANGE)
    tower = tower or load_tower(
        recipe.tower, layer=recipe.feature_layer, aspect=recipe.image_aspect, vae=recipe.vae, device=device
    )  # fmt: skip
    sources = sources or [source_of(stage, tower) for stage in recipe.stages]
    texts = (text for source in sources for one in source.conversations for turn in one.turns for text in turn[:2] if text)
    language_model, tokenizer = build_language_model(recipe, texts)
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.seed)
        model = Understander(language_model, tower.width).to(device or "cpu")
    trainer = Trainer(recipe, model, tokenizer, tower, sources)
    if resumed:
        trainer.load(run_dir / CHECKPOINT)
        if trainer.finished and (run_dir / MODEL).is_dir():
            return True
    with naming_full_disk(run_dir), StopRequest() as stop:
        start_run(recipe, resumed, MODEL)
        if not _run(trainer, run_dir, stop):
            return False
        trainer.answerer().save(run_dir / MODEL)
    return True


def _run(trainer: Trainer, run_dir: Path, stop: StopRequest) -> bool:
    log = RunLog(run_dir, trainer.progress.step)
    with Display() as display:
        millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        display.note(f"{trainer.tower.tokens} tokens an image, {millions:.1f} M parameters, from step {trainer.progress.step}")
        try:
            while not trainer.finished:
                _announce(trainer, display)
                if not _run_stage(trainer, run_dir, log, display, stop):
                    trainer.save(run_dir / CHECKPOINT)
                    display.note(f"{stop.name}: saved at step {trainer.progress.step}; --resume goes on")
                    return False
                trainer.end_stage()
                trainer.save(run_dir / CHECKPOINT)
        finally:
            log.close()
    return True


def _announce(trainer: Trainer, display: Display) -> None:
    stage, left_out = trainer.stage, trainer.left_out
    without = f" ({left_out} longer than max_length left out)" if left_out else ""
    display.note(
        f"stage {stage.name}: {len(trainer.examples)} conversations{without}, {trainer.steps} steps, trains {stage.trains}"
    )
    if trainer.recipe.cache_features:
        trainer.features.encode([one.image for one in trainer.examples if one.image is not None], display)


def _run_stage(trainer: Trainer, run_dir: Path, log: RunLog, display: Display, stop: StopRequest) -> bool:
    """False if it was stopped."""
    recipe, progress = trainer.recipe, trainer.progress
    rows = StepRows(log, display, recipe.log_every, ("images", "answers"))
    while progress.stage_step < trainer.steps:
        if stop.name is not None:
            return False
        row = trainer.step()
        stage, done = trainer.stage.name, progress.stage_step
        rows.add(stage, {"step": progress.step, "stage": stage, **row}, done, trainer.steps)
        if progress.step % recipe.checkpoint_every == 0 and done < trainer.steps:
            trainer.save(run_dir / CHECKPOINT)
    return True
