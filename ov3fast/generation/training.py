"""Training of a generator on a frozen model's tokens.

Step s draws its pictures, noise and times from (seed, s) alone, so a run that was stopped goes on to the same bits. Under torchrun each
process takes its rows of every batch, whose draws are the same; the generator is copied (DistributedDataParallel) or sharded (FSDP2). A
checkpoint is the same whatever wrote it. A run folder holds

    recipe.json  log.jsonl  checkpoint/ (weights, average, moments, step)  generator/ (what `ov3fast generate` loads)
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ov3fast.generation import flow
from ov3fast.generation.ddt import DDT, GeneratorConfig, InContextDDT, build_generator
from ov3fast.generation.muon import MuonAdamW
from ov3fast.generation.saved import GENERATOR, SavedGenerator
from ov3fast.generation.tokens import Tokens, encode_tokens
from ov3fast.inference.load import load_model
from ov3fast.io import atomic_folder, atomic_write, check_writable_folder, naming_full_disk
from ov3fast.recipes.config import OptimizerConfig
from ov3fast.recipes.generate import GenerateRecipe
from ov3fast.terminal import is_terminal
from ov3fast.training import distributed
from ov3fast.training.distributed import ALONE, Ranks
from ov3fast.training.optimizer import AdamW, copy
from ov3fast.training.parallel import whole

RECIPE, LOG, CHECKPOINT = "recipe.json", "log.jsonl", "checkpoint"
FREE = ("steps", "checkpoint_every", "log_every", "run_dir", "parallel")
"""What a run may change when it goes on."""


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
        self.parallel: nn.Module = self.generator
        if ranks.group is not None and recipe.parallel == "fsdp":
            shard(self.generator, ranks)
        elif ranks.group is not None:
            self.parallel = DistributedDataParallel(self.generator)
        config = OptimizerConfig(
            betas=recipe.betas, weight_decay=recipe.weight_decay, clip_norm=recipe.clip_norm, ema_decay=recipe.ema_decay
        )
        self.optimizer = (MuonAdamW if recipe.optimizer == "muon" else AdamW)(self.generator, config)
        self.shift = flow.time_shift(tokens.latents.shape[1:]) if recipe.time_shift is None else recipe.time_shift

    def step(self) -> dict[str, float]:
        """RuntimeError where the gradient is not finite; nothing was changed then."""
        recipe, draws = self.recipe, flow.generator_of(f"generate/{self.recipe.seed}/{self.done}")
        size, ranks = recipe.batch_size, self.ranks
        rows = torch.randint(len(self.tokens), (size,), generator=draws)
        noise = torch.randn((size, *self.tokens.latents.shape[1:]), generator=draws)
        t = flow.draw_times(torch.randn(size, generator=draws), self.shift)
        dropped = torch.rand(size, generator=draws) < recipe.dropout
        rows, noise, t, dropped = (of.tensor_split(ranks.world)[ranks.rank] for of in (rows, noise, t, dropped))
        x, condition, noise, t, dropped = (of.to(ranks.device) for of in (*self.tokens.take(rows), noise, t, dropped))
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            velocities = self.parallel(flow.interpolate(x, noise, t), t, condition, dropped)
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
        """The generator with the average's weights. Every rank takes part."""
        average = build_generator(self.generator.config).to(self.ranks.device)
        average.load_state_dict({name: whole(value) for name, value in self.generator.state_dict().items()})
        copy(
            dict(average.named_parameters()),
            {name: whole(value) for name, value in (self.optimizer.ema or {}).items()},
            "average",
        )
        return SavedGenerator(average, self.tokens.statistics, self.recipe.model, self.tokens.classes, self.shift)

    def save(self, folder: Path) -> None:
        """Every rank takes part, the first one writes."""
        from safetensors.torch import save_file

        state = {f"weights/{name}": value for name, value in self.generator.state_dict().items()}
        state |= {f"moments/{name}": value for name, value in self.optimizer.moments().items()}
        state |= {f"average/{name}": value for name, value in (self.optimizer.ema or {}).items()}
        state = {name: whole(value).contiguous() for name, value in state.items()}
        if not self.ranks.first:
            return
        with atomic_folder(folder) as temporary:
            save_file(state, temporary / "state.safetensors")
            (temporary / "step.json").write_text(json.dumps({"step": self.done}))

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        state = load_file(folder / "state.safetensors")
        self.done = json.loads((folder / "step.json").read_text())["step"]
        weights, moments, average = (
            {name.removeprefix(kind): value for name, value in state.items() if name.startswith(kind)}
            for kind in ("weights/", "moments/", "average/")
        )
        copy(self.generator.state_dict(), weights, "generator")
        self.optimizer.load(moments, average, self.done)


def shard(generator: DDT | InContextDDT, ranks: Ranks) -> None:
    """FSDP2 in place: a block's weights are gathered before it runs and freed behind it; the rest is one more group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in (*generator.trunk, *generator.head):
        fully_shard(block, mesh=mesh)
    fully_shard(generator, mesh=mesh, reshard_after_forward=False)


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
        print(f"{len(tokens)} samples of {shape}, {millions:.1f} M parameters, from step {trainer.done}")
    with Rows(trainer, run_dir) if ranks.first else nullcontext() as rows:
        while trainer.done < recipe.steps:
            row = trainer.step()
            if rows is not None:
                rows.add(row)
            if trainer.done % recipe.checkpoint_every == 0 or trainer.done == recipe.steps:
                trainer.save(run_dir / CHECKPOINT)
    saved = trainer.saved()
    if ranks.first:
        saved.save(run_dir / GENERATOR)
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
