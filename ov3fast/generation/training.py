"""Training a generator on a frozen model's tokens.

The images, noise and times of step s depend only on (seed, s), so a resumed run is bit-identical to an uninterrupted one. Under
torchrun all processes draw the same batch and each takes its own rows; the generator is replicated (DistributedDataParallel) or
sharded (FSDP2). The checkpoint format doesn't depend on which. A run folder holds

    recipe.json  log.jsonl  checkpoint/ (weights, EMA, moments, step)  generator/ (what `ov3fast generate` loads)
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ov3fast.generation import flow
from ov3fast.generation.ddt import DDT, GeneratorConfig, InContextDDT, build_generator
from ov3fast.generation.muon import MuonAdamW
from ov3fast.generation.saved import GENERATOR, SavedGenerator
from ov3fast.generation.tokens import Tokens, encode_tokens
from ov3fast.inference.load import load_model
from ov3fast.io import naming_full_disk
from ov3fast.recipes.config import OptimizerConfig
from ov3fast.recipes.generate import GenerateRecipe
from ov3fast.terminal import is_terminal
from ov3fast.training import distributed
from ov3fast.training.distributed import ALONE, Ranks
from ov3fast.training.logs import Display, RunLog, StepRows
from ov3fast.training.optimizer import AdamW, copy
from ov3fast.training.parallel import whole
from ov3fast.training.run_folder import CHECKPOINT, check_run_dir, load_checkpoint, save_checkpoint, start_run
from ov3fast.training.signals import StopRequest

MAY_CHANGE = ("steps", "checkpoint_every", "log_every", "run_dir", "parallel")
"""Recipe fields that may change when a run is resumed."""


def generator_config(recipe: GenerateRecipe, tokens: Tokens) -> GeneratorConfig:
    channels, height, width = tokens.latents.shape[1:]
    kind = {"classes": len(tokens.classes)} if tokens.classes else {"classes": 0, "text_width": tokens.condition.shape[2]}
    return GeneratorConfig(
        channels, height, width, recipe.widths, recipe.depths, recipe.heads, in_context=recipe.in_context,
        predicts_x=recipe.predicts == "x", **kind,
    )  # fmt: skip


class Trainer:
    """A generator, its optimizer and the tokens. step() depends only on checkpointed state and step number. ValueError if the
    batch can't be split evenly over the processes."""

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
        """One update; returns its log row. RuntimeError if the gradient is not finite, which leaves the weights unchanged."""
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
        return {"step": self.done, "loss": loss, "grad_norm": norm, "lr": lr, "images": size}

    def saved(self) -> SavedGenerator:
        """The generator with EMA weights. Collective: call on every rank."""
        average = build_generator(self.generator.config).to(self.ranks.device)
        average.load_state_dict({name: whole(value) for name, value in self.generator.state_dict().items()})
        copy(
            dict(average.named_parameters()),
            {name: whole(value) for name, value in (self.optimizer.ema or {}).items()},
            "average",
        )
        return SavedGenerator(average, self.tokens.statistics, self.recipe.model, self.tokens.classes, self.shift)

    def save(self, folder: Path) -> None:
        """Write a checkpoint. Collective: call on every rank; the first one writes."""
        optimizer = self.optimizer
        groups = {"weights": self.generator.state_dict(), "moments": optimizer.moments(), "average": optimizer.ema or {}}
        groups = {kind: {name: whole(value) for name, value in tensors.items()} for kind, tensors in groups.items()}
        if self.ranks.first:
            save_checkpoint(folder, groups, {"step": self.done})

    def load(self, folder: Path) -> None:
        groups, progress = load_checkpoint(folder)
        self.done = progress["step"]
        copy(self.generator.state_dict(), groups["weights"], "generator")
        self.optimizer.load(groups["moments"], groups.get("average", {}), self.done)


def shard(generator: DDT | InContextDDT, ranks: Ranks) -> None:
    """Apply FSDP2 in place: each block's weights are gathered before it runs and freed after it; the rest forms one group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in (*generator.trunk, *generator.head):
        fully_shard(block, mesh=mesh)
    fully_shard(generator, mesh=mesh, reshard_after_forward=False)


def train_generator(recipe: GenerateRecipe, *, resume: bool = False, overwrite: bool = False) -> Path | None:
    """Train a recipe, alone or under torchrun. Returns the run folder, or None if a signal stopped the run, which was saved.

    resume: continue the run in recipe.run_dir, or start one if there is none. Errors as in `check_run_dir`; the recipe of a
    resumed run may differ only in its length, checkpoint and log intervals, run_dir and `parallel`. RuntimeError if a gradient
    is not finite.
    """
    run_dir = recipe.run_dir
    resumed = check_run_dir(recipe, resume=resume, overwrite=overwrite, may_change=MAY_CHANGE)
    ranks = distributed.start()
    model = load_model(recipe.model, device=ranks.device, vae=recipe.vae)
    tokens = encode_tokens(recipe, model, ranks.first and is_terminal(), ranks)
    trainer = Trainer(recipe, tokens, ranks)
    if resumed:
        trainer.load(run_dir / CHECKPOINT)
    with naming_full_disk(run_dir), StopRequest() as stop, Display(show=ranks.first) as display:
        if ranks.first:
            start_run(recipe, resumed, GENERATOR)
        millions = sum(p.numel() for p in trainer.generator.parameters()) / 1e6
        shape = " x ".join(map(str, tokens.latents.shape[1:]))
        display.note(f"{len(tokens)} samples of {shape}, {millions:.1f} M parameters, from step {trainer.done}")
        with closing(RunLog(run_dir, trainer.done)) if ranks.first else nullcontext() as log:
            rows = None if log is None else StepRows(log, display, recipe.log_every)
            while trainer.done < recipe.steps:
                row = trainer.step()
                if rows is not None:
                    rows.add("train", row, trainer.done, recipe.steps)
                [asked] = ranks.largest(stop.name is not None)
                if asked or trainer.done % recipe.checkpoint_every == 0 or trainer.done == recipe.steps:
                    trainer.save(run_dir / CHECKPOINT)
                if asked and trainer.done < recipe.steps:
                    display.note(f"{stop.name or 'another process'}: saved at step {trainer.done}; --resume goes on")
                    ranks.wait()  # torchrun terminates the other processes once one exits
                    return None
        saved = trainer.saved()
        if ranks.first:
            saved.save(run_dir / GENERATOR)
    ranks.wait()
    return run_dir
