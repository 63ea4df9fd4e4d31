"""Training of a generator on a frozen model's tokens.

Every picture is encoded once; the tokens, normalized by their statistics, stay in memory. Step s draws its pictures, noise and times from
(seed, s) alone, so a run that was stopped goes on to the same bits. Under torchrun each process encodes its part of the pictures and takes
its rows of every batch, whose draws are the same; the gradients go through DistributedDataParallel. A run folder holds

    recipe.json  log.jsonl  checkpoint/ (weights, average, moments, step)  generator/ (what `ov3fast generate` loads)
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ov3fast.data.skips import DataError
from ov3fast.data.store import resolve
from ov3fast.evaluation.pictures import Pictures, read_pictures
from ov3fast.evaluation.reconstruction import to_model_range
from ov3fast.generation import flow
from ov3fast.generation.ddt import DDT, GeneratorConfig, InContextDDT, build_generator
from ov3fast.generation.moments import ElementMoments
from ov3fast.generation.muon import MuonAdamW
from ov3fast.generation.saved import GENERATOR, SavedGenerator
from ov3fast.generation.statistics import LatentStatistics, as_latents
from ov3fast.inference.load import load_model
from ov3fast.io import atomic_folder, atomic_write, check_writable_folder, naming_full_disk
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.recipes.config import OptimizerConfig
from ov3fast.recipes.generate import GenerateRecipe
from ov3fast.terminal import is_terminal
from ov3fast.training import distributed
from ov3fast.training.distributed import ALONE, Ranks
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


def read_data(
    paths: Sequence[str], recipe: GenerateRecipe, model: OpenVision3, progress: bool = False
) -> tuple[Tensor, list[str], list[str]]:
    """Pictures uint8 [N, 3, S, S] of the recipe's data or heldout, and of each its class and its caption. DataError where a sample
    names no class."""
    sets: list[Pictures] = [read_pictures(resolve(path), model.config.vision.image_size, progress=progress) for path in paths]
    names = [name for pictures in sets for name in pictures.column(recipe.class_field)]
    if recipe.condition == "class" and not all(names):
        raise DataError(
            f"generate: {names.count('')} of {len(names)} samples have no {recipe.class_field!r} in their metadata (class_field)"
        )
    return torch.cat([pictures.images for pictures in sets]), names, [text for pictures in sets for text in pictures.texts()]


@torch.inference_mode()
def encode_tokens(recipe: GenerateRecipe, model: OpenVision3, progress: bool = False, ranks: Ranks = ALONE) -> Tokens:
    """The pictures' tokens, and with recipe.flip those of their mirror images behind them; all of them on every rank."""
    images, names, texts = read_data(recipe.data, recipe, model, progress)
    if recipe.flip:
        images, names, texts = torch.cat([images, images.flip(-1)]), names * 2, texts * 2
    parts, moments = [], ElementMoments()
    own = images.tensor_split(ranks.world)[ranks.rank]
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("encode", total=len(own))
        for batch in own.split(64):
            parts.append(as_latents(model.encode(to_model_range(batch))[1].float().cpu()))
            moments.add(parts[-1])
            bar.advance(task, len(batch))
    parts = [part for of_rank in ranks.gather(parts) for part in of_rank]
    moments.all_reduce(ranks.control)
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
        channels, height, width, recipe.widths, recipe.depths, recipe.heads, in_context=recipe.in_context,
        predicts_x=recipe.predicts == "x", **kind,
    )  # fmt: skip


class Trainer:
    """A generator, its optimizer and the tokens: `step()` does one update, a function of what was saved and of the step's number."""

    def __init__(self, recipe: GenerateRecipe, tokens: Tokens, ranks: Ranks = ALONE) -> None:
        if recipe.batch_size % ranks.world:
            raise ValueError(f"generate: batch_size {recipe.batch_size} must be a multiple of the {ranks.world} processes")
        self.recipe, self.tokens, self.ranks, self.done = recipe, tokens, ranks, 0
        with torch.random.fork_rng([]):
            torch.manual_seed(recipe.seed)
            self.generator: DDT | InContextDDT = build_generator(generator_config(recipe, tokens)).to(ranks.device)
        self.parallel: nn.Module = self.generator if ranks.group is None else DistributedDataParallel(self.generator)
        config = OptimizerConfig(
            betas=recipe.betas, weight_decay=recipe.weight_decay, clip_norm=recipe.clip_norm, ema_decay=recipe.ema_decay
        )
        self.optimizer = (MuonAdamW if recipe.optimizer == "muon" else AdamW)(self.generator, config)
        self.shift = flow.time_shift(tokens.latents.shape[1:]) if recipe.time_shift is None else recipe.time_shift

    def step(self) -> dict[str, float]:
        """RuntimeError where the gradient is not finite; nothing was changed then."""
        recipe, draws = self.recipe, flow.generator_of(f"generate/{self.recipe.seed}/{self.done}")
        size, ranks = recipe.batch_size, self.ranks
        rows = torch.randint(len(self.tokens.latents), (size,), generator=draws)
        noise = torch.randn((size, *self.tokens.latents.shape[1:]), generator=draws)
        t = flow.draw_times(torch.randn(size, generator=draws), self.shift)
        dropped = torch.rand(size, generator=draws) < recipe.dropout
        rows, noise, t, dropped = (of.tensor_split(ranks.world)[ranks.rank] for of in (rows, noise, t, dropped))
        x, condition = self.tokens.latents[rows], self.tokens.condition[rows]
        x, condition, noise, t, dropped = (of.to(ranks.device) for of in (x, condition, noise, t, dropped))
        condition = self.generator.drop(condition, dropped)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            velocities = self.parallel(flow.interpolate(x, noise, t), t, condition)
        losses = [flow.velocity_loss(v, x, noise, t, clamped=self.generator.config.clamped) for v in velocities]
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
        loss = float(ranks.total(losses[0].detach().double().cpu())) / ranks.world
        return {"step": self.done, "loss": loss, "grad_norm": norm, "lr": lr}

    def saved(self) -> SavedGenerator:
        """The generator with the average's weights."""
        average = build_generator(self.generator.config).to(self.ranks.device)
        average.load_state_dict(self.generator.state_dict())
        copy(dict(average.named_parameters()), self.optimizer.ema or {}, "average")
        return SavedGenerator(average, self.tokens.statistics, self.recipe.model, self.tokens.classes, self.shift)

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
    """Runs a recipe to its end, as one process or as torchrun's, and returns the run's folder; see the file's head.

    resume: go on with the run in recipe.run_dir; where there is none, one begins. FileExistsError for a run that is there without resume
    or overwrite; ValueError where a resumed run's recipe differs in more than its length and how often it saves and logs.
    """
    run_dir = check_writable_folder(recipe.run_dir, "run_dir")
    there = (run_dir / RECIPE).is_file()
    if there and resume:
        _check_same(recipe, json.loads((run_dir / RECIPE).read_text()))
    elif there and not overwrite:
        raise FileExistsError(f"generate: {run_dir} holds a run; --resume goes on with it, --overwrite begins again")
    ranks = distributed.start()
    model = load_model(recipe.model, device=ranks.device, vae=recipe.vae)
    tokens = encode_tokens(recipe, model, ranks.first and is_terminal(), ranks)
    trainer = Trainer(recipe, tokens, ranks)
    if there and resume and (run_dir / CHECKPOINT).is_dir():
        trainer.load(run_dir / CHECKPOINT)
    if ranks.first:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not trainer.done:
            (run_dir / LOG).unlink(missing_ok=True)
        with naming_full_disk(run_dir), atomic_write(run_dir / RECIPE) as temporary:
            temporary.write_text(json.dumps(asdict(recipe), indent=1, default=str))
        millions = sum(p.numel() for p in trainer.generator.parameters()) / 1e6
        shape = " x ".join(map(str, tokens.latents.shape[1:]))
        print(f"{len(tokens.latents)} samples of {shape}, {millions:.1f} M parameters, from step {trainer.done}")
    with Rows(trainer, run_dir) if ranks.first else nullcontext() as rows:
        while trainer.done < recipe.steps:
            row = trainer.step()
            if rows is not None:
                rows.add(row)
            if ranks.first and (trainer.done % recipe.checkpoint_every == 0 or trainer.done == recipe.steps):
                trainer.save(run_dir / CHECKPOINT)
    if ranks.first:
        trainer.saved().save(run_dir / GENERATOR)
    ranks.wait()
    return run_dir


class Rows:
    """The log, the bar, and without a terminal a line now and then; a full disk names the run's folder."""

    def __init__(self, trainer: Trainer, run_dir: Path) -> None:
        self.trainer, self.losses, self.start = trainer, [], time.perf_counter()
        _cut_log(run_dir / LOG, trainer.done)
        self.stack = ExitStack()
        self.stack.enter_context(naming_full_disk(run_dir))
        self.log = self.stack.enter_context((run_dir / LOG).open("a", encoding="utf-8"))
        self.bar = self.stack.enter_context(Progress(disable=not is_terminal(), transient=True))
        self.task = self.bar.add_task("train", total=trainer.recipe.steps, completed=trainer.done)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)

    def add(self, row: dict[str, float]) -> None:
        """A step's figures; every log_every steps their mean loss is written."""
        recipe, step = self.trainer.recipe, self.trainer.done
        self.losses.append(row["loss"])
        self.bar.advance(self.task)
        if step % recipe.log_every and step != recipe.steps:
            return
        rate = len(self.losses) * recipe.batch_size / (time.perf_counter() - self.start)
        row |= {"loss": sum(self.losses) / len(self.losses), "samples_per_second": rate}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        if not is_terminal():
            print(f"step {step}/{recipe.steps}  loss {row['loss']:.4f}  {rate:.0f} samples/s", flush=True)
        self.losses, self.start = [], time.perf_counter()


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
