"""Training of a generator on a frozen model's tokens.

Every picture is encoded once; the tokens, normalized by their statistics, stay in memory. Step s draws its pictures, noise and times from
(seed, s) alone, so a run that was stopped goes on to the same bits. One process; a run folder holds

    recipe.json  log.jsonl  checkpoint/ (weights, average, moments, step)  generator/ (what `ov3fast generate` loads)
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ov3fast.data.skips import DataError
from ov3fast.data.store import resolve
from ov3fast.evaluation.pictures import Pictures, read_pictures
from ov3fast.evaluation.reconstruction import to_model_range
from ov3fast.generation import flow
from ov3fast.generation.ddt import DDT, GeneratorConfig, InContextDDT, build_generator
from ov3fast.generation.moments import ElementMoments
from ov3fast.generation.saved import GENERATOR, SavedGenerator
from ov3fast.generation.statistics import LatentStatistics, as_latents
from ov3fast.inference.load import load_model
from ov3fast.io import atomic_folder, atomic_write, check_writable_folder, naming_full_disk
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.recipes.config import OptimizerConfig
from ov3fast.recipes.generate import GenerateRecipe
from ov3fast.terminal import is_terminal
from ov3fast.training.optimizer import AdamW, copy

RECIPE, LOG, CHECKPOINT = "recipe.json", "log.jsonl", "checkpoint"
FREE = ("steps", "checkpoint_every", "log_every", "run_dir")
"""What a run may change when it goes on."""


class Tokens(NamedTuple):
    """latents: normalized, float32 [N, C, H, W]. condition: labels int64 [N], or text tokens [N, L, E]. classes: the labels' names."""

    latents: Tensor
    condition: Tensor
    classes: list[str]
    statistics: LatentStatistics


def read_data(recipe: GenerateRecipe, model: OpenVision3, progress: bool = False) -> tuple[Tensor, list[str], list[str]]:
    """The recipe's pictures uint8 [N, 3, S, S], and of each its class and its caption. DataError where a sample names no class."""
    sets: list[Pictures] = [
        read_pictures(resolve(path), model.config.vision.image_size, progress=progress) for path in recipe.data
    ]
    names = [name for pictures in sets for name in pictures.column(recipe.class_field)]
    if recipe.condition == "class" and not all(names):
        raise DataError(
            f"generate: {names.count('')} of {len(names)} samples have no {recipe.class_field!r} in their metadata (class_field)"
        )
    return torch.cat([pictures.images for pictures in sets]), names, [text for pictures in sets for text in pictures.texts()]


@torch.inference_mode()
def encode_tokens(recipe: GenerateRecipe, model: OpenVision3, progress: bool = False) -> Tokens:
    """The pictures' tokens, and with recipe.flip those of their mirror images behind them."""
    images, names, texts = read_data(recipe, model, progress)
    if recipe.flip:
        images, names, texts = torch.cat([images, images.flip(-1)]), names * 2, texts * 2
    parts, moments = [], ElementMoments()
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("encode", total=len(images))
        for batch in images.split(64):
            parts.append(as_latents(model.encode(to_model_range(batch))[1].float().cpu()))
            moments.add(parts[-1])
            bar.advance(task, len(batch))
    about = {"images": str(len(images)), "image_size": str(images.shape[-1]), "latents": model.config.latent_convention}
    statistics = LatentStatistics(
        moments.mean, moments.var, about | {"preprocess": "white background, shorter side resized, centre crop"}
    )
    classes = sorted(set(names)) if recipe.condition == "class" else []
    if classes:
        condition = torch.tensor([classes.index(name) for name in names])
    else:
        condition = torch.cat([text_tokens(model, texts[i : i + 256]) for i in range(0, len(texts), 256)])
    return Tokens(statistics.normalize(torch.cat(parts)), condition, classes, statistics)


@torch.inference_mode()
def text_tokens(model: OpenVision3, texts: list[str]) -> Tensor:
    """Texts -> the text tower's tokens [B, L, E], float32 on the CPU."""
    return model.text(model.text_ids(texts), return_tokens=True)[1].float().cpu()


def generator_config(recipe: GenerateRecipe, tokens: Tokens) -> GeneratorConfig:
    channels, height, width = tokens.latents.shape[1:]
    kind = {"classes": len(tokens.classes)} if tokens.classes else {"classes": 0, "text_width": tokens.condition.shape[2]}
    return GeneratorConfig(
        channels, height, width, recipe.widths, recipe.depths, recipe.heads, in_context=recipe.in_context, **kind
    )  # fmt: skip


class Trainer:
    """A generator, its optimizer and the tokens: `step()` does one update, a function of what was saved and of the step's number."""

    def __init__(self, recipe: GenerateRecipe, tokens: Tokens) -> None:
        self.recipe, self.tokens, self.done = recipe, tokens, 0
        with torch.random.fork_rng([]):
            torch.manual_seed(recipe.seed)
            self.generator: DDT | InContextDDT = build_generator(generator_config(recipe, tokens))
        config = OptimizerConfig(
            betas=recipe.betas, weight_decay=recipe.weight_decay, clip_norm=recipe.clip_norm, ema_decay=recipe.ema_decay
        )
        self.optimizer = AdamW(self.generator, config)
        self.shift = flow.time_shift(tokens.latents.shape[1:])

    def step(self) -> dict[str, float]:
        """RuntimeError where the gradient is not finite; nothing was changed then."""
        recipe, draws = self.recipe, flow.generator_of(f"generate/{self.recipe.seed}/{self.done}")
        rows = torch.randint(len(self.tokens.latents), (recipe.batch_size,), generator=draws)
        x = self.tokens.latents[rows]
        noise = torch.randn(x.shape, generator=draws)
        t = flow.draw_times(torch.randn(len(x), generator=draws), self.shift)
        dropped = torch.rand(len(x), generator=draws) < recipe.dropout
        condition = self.generator.drop(self.tokens.condition[rows], dropped)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            velocities = self.generator(flow.interpolate(x, noise, t), t, condition)
        losses = [flow.velocity_loss(v, x, noise, t, clamped=recipe.in_context) for v in velocities]
        self.optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        lr = recipe.lr_at(self.done)
        self.optimizer.set_lr(lr)
        self.optimizer.step()
        self.done += 1
        norm = float(self.optimizer.grad_norm)
        if not torch.isfinite(self.optimizer.grad_norm):
            raise RuntimeError(
                f"generate: the gradient of step {self.done} is not finite; try a smaller --lr or --precision fp32"
            )
        return {"step": self.done, "loss": float(losses[0].detach()), "grad_norm": norm, "lr": lr}

    def saved(self) -> SavedGenerator:
        """The generator with the average's weights."""
        average = build_generator(self.generator.config)
        average.load_state_dict(self.generator.state_dict())
        copy(dict(average.named_parameters()), self.optimizer.ema or {}, "average")
        return SavedGenerator(average, self.tokens.statistics, self.recipe.model, self.tokens.classes)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        state = {f"weights/{name}": value for name, value in self.generator.state_dict().items()}
        state |= {f"moments/{name}": value for name, value in self.optimizer.moments().items()}
        state |= {f"average/{name}": value for name, value in (self.optimizer.ema or {}).items()}
        with atomic_folder(folder) as temporary:
            save_file({name: value.contiguous() for name, value in state.items()}, temporary / "state.safetensors")
            (temporary / "step.json").write_text(json.dumps({"step": self.done}))

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        state = load_file(folder / "state.safetensors")
        self.done = json.loads((folder / "step.json").read_text())["step"]
        weights, moments, average = (
            {name.removeprefix(kind): value for name, value in state.items() if name.startswith(kind)}
            for kind in ("weights/", "moments/", "average/")
        )
        nn.Module.load_state_dict(self.generator, weights)
        self.optimizer.load(moments, average, self.done)


def train_generator(recipe: GenerateRecipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Runs a recipe to its end and returns the run's folder; see the file's head.

    FileExistsError for a run that is there without resume or overwrite; ValueError where a resumed run's recipe differs in more than its
    length and how often it saves and logs.
    """
    run_dir = check_writable_folder(recipe.run_dir, "run_dir")
    there = (run_dir / RECIPE).is_file()
    if there and resume:
        _check_same(recipe, json.loads((run_dir / RECIPE).read_text()))
    elif there and not overwrite:
        raise FileExistsError(f"generate: {run_dir} holds a run; --resume goes on with it, --overwrite begins again")
    elif resume:
        raise FileNotFoundError(f"generate: no run to resume in {run_dir}")
    progress = is_terminal()
    tokens = encode_tokens(recipe, load_model(recipe.model, vae=recipe.vae), progress)
    trainer = Trainer(recipe, tokens)
    run_dir.mkdir(parents=True, exist_ok=True)
    if resume and (run_dir / CHECKPOINT).is_dir():
        trainer.load(run_dir / CHECKPOINT)
    else:
        (run_dir / LOG).unlink(missing_ok=True)
    with naming_full_disk(run_dir), atomic_write(run_dir / RECIPE) as temporary:
        temporary.write_text(json.dumps(asdict(recipe), indent=1, default=str))
    millions = sum(p.numel() for p in trainer.generator.parameters()) / 1e6
    print(
        f"{len(tokens.latents)} samples of {' x '.join(map(str, tokens.latents.shape[1:]))}, {millions:.1f} M parameters, from step {trainer.done}"
    )
    _run(trainer, run_dir, progress)
    trainer.saved().save(run_dir / GENERATOR)
    return run_dir


def _run(trainer: Trainer, run_dir: Path, progress: bool) -> None:
    recipe = trainer.recipe
    _cut_log(run_dir / LOG, trainer.done)
    with (
        (run_dir / LOG).open("a", encoding="utf-8") as log,
        Progress(disable=not progress, transient=True) as bar,
        naming_full_disk(run_dir),
    ):
        task = bar.add_task("train", total=recipe.steps, completed=trainer.done)
        start, losses = time.perf_counter(), []
        while trainer.done < recipe.steps:
            row = trainer.step()
            losses.append(row["loss"])
            bar.advance(task)
            if trainer.done % recipe.log_every == 0 or trainer.done == recipe.steps:
                seconds = time.perf_counter() - start
                row |= {"loss": sum(losses) / len(losses), "samples_per_second": len(losses) * recipe.batch_size / seconds}
                log.write(json.dumps(row) + "\n")
                log.flush()
                if not progress:
                    print(
                        f"step {trainer.done}/{recipe.steps}  loss {row['loss']:.4f}  {row['samples_per_second']:.0f} samples/s"
                    )
                start, losses = time.perf_counter(), []
            if trainer.done % recipe.checkpoint_every == 0 or trainer.done == recipe.steps:
                trainer.save(run_dir / CHECKPOINT)


def _cut_log(path: Path, step: int) -> None:
    """Leaves the rows up to `step`: what came after the checkpoint is done again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines))


def _check_same(recipe: GenerateRecipe, before: dict[str, object]) -> None:
    now = json.loads(json.dumps(asdict(recipe), default=str))
    changed = [name for name in now if name not in FREE and now[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(f"generate: --resume keeps the recipe, but {name} is {now[name]!r} and was {before.get(name)!r}")
