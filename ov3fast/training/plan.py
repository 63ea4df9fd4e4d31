"""What a recipe comes to, before any of it runs: steps, rates, parameters, FLOPs. Needs no data and no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ov3fast import terminal
from ov3fast.models.flops import flops_per_image, lpips_flops, mlp_flops_per_image, parameter_counts
from ov3fast.recipes.config import Recipe, Stage
from ov3fast.recipes.plain import leaves
from ov3fast.training.schedule import Schedule, schedule

TOWERS = ("encoder", "decoder", "text", "captioner")


@dataclass(frozen=True)
class StagePlan:
    """One stage, resolved. samples, steps and training_flops are None for a wall-time budget."""

    stage: Stage
    schedule: Schedule
    tokens: int
    """Tokens per image."""
    samples: int | None
    flops: dict[str, float]
    """Part -> forward FLOPs of one image (or text, or caption)."""
    flops_by_part: dict[str, float]
    """towers, VAE encoder, VAE decoder, LPIPS -> forward and backward FLOPs per image of the batch, with the shares that are decoded to
    pixels, captioned and paired."""

    @property
    def flops_per_sample(self) -> float:
        """Forward and backward, per image of the batch."""
        return sum(self.flops_by_part.values())

    @property
    def training_flops(self) -> float | None:
        return None if self.schedule.steps is None else self.flops_per_sample * self.schedule.steps * self.stage.batch_size


@dataclass(frozen=True)
class Plan:
    """The whole recipe, resolved."""

    recipe: Recipe
    stages: tuple[StagePlan, ...]
    parameters: dict[str, int]


def make_plan(recipe: Recipe) -> Plan:
    """Resolves a recipe.

    A tower's backward pass costs twice its forward pass (three times with activation checkpointing, less where it recomputes MLPs alone); the frozen VAE decoder's as much
    as its forward pass, since only the gradient with respect to its input is needed, and LPIPS' likewise (it sees two images); the VAE
    encoder has none.
    """
    recipe = recipe.resolve()
    stages = []
    for stage in recipe.stages:
        times = schedule(stage, recipe.optimizer.min_lr)
        flops = flops_per_image(recipe.model, stage.image_size)
        by_part = flops_by_part(recipe, stage, flops)
        samples = None if times.steps is None else times.steps * stage.batch_size
        if stage.epochs is not None:
            samples = round(stage.epochs * stage.samples_per_epoch)
        tokens = (stage.image_size // (8 * recipe.model.vision.patch_size)) ** 2
        stages.append(StagePlan(stage, times, tokens, samples, flops, by_part))
    return Plan(recipe, tuple(stages), parameter_counts(recipe.model))


def flops_by_part(recipe: Recipe, stage: Stage, flops: dict[str, float] | None = None) -> dict[str, float]:
    """`StagePlan.flops_by_part`. flops: those of `flops_per_image`, where they are known already."""
    flops = flops_per_image(recipe.model, stage.image_size) if flops is None else flops
    texts, paired = texts_and_paired(recipe)
    again = mlp_flops_per_image(recipe.model, stage.image_size) if recipe.recompute == "mlp" else flops
    towers = {name: 3.0 * flops[name] + (again[name] if recipe.activation_checkpointing else 0.0) for name in TOWERS}
    needs_pixels = recipe.stage_objective(stage).needs_pixels
    latents = 1.0 if stage.latent_images is None else stage.latent_images / stage.batch_size
    pixels = 0.0 if not needs_pixels else latents if stage.pixel_images is None else stage.pixel_images / stage.batch_size
    captions = paired if stage.caption_images is None else stage.caption_images / stage.batch_size
    contrasted = (
        flops["encoder"] + texts * flops["text"] if recipe.accumulate > 1 and recipe.contrastive_over == "batch" else 0.0
    )
    by_part = {
        "towers": towers["encoder"]
        + texts * towers["text"]
        + latents * towers["decoder"]
        + captions * towers["captioner"]
        + contrasted,
        "VAE encoder": 0.0 if recipe.cache_latents else flops["vae_encoder"],
        "VAE decoder": 2.0 * pixels * flops["vae_decoder"],
    }
    if needs_pixels and stage.lpips_weight > 0:
        by_part["LPIPS"] = 4.0 * pixels * lpips_flops(recipe.lpips.backbone, stage.image_size)
    return by_part


def texts_and_paired(recipe: Recipe) -> tuple[float, float]:
    """(texts, images with a caption) per image of a batch: a grouped source shows each text in `views` images."""
    sources = recipe.data.sources
    total = sum(source.fraction for source in sources)
    if not sources or not total:
        return 1.0, 1.0
    paired = [source for source in sources if source.paired]
    return sum(s.fraction / s.views for s in paired) / total, sum(s.fraction for s in paired) / total


def dry_run(recipe: Recipe, console: Any = None) -> Plan:
    """Prints the plan: every field of the recipe, its stages, and the parts' parameters and FLOPs."""
    from rich.table import Table

    console = console or terminal.console()
    result = make_plan(recipe)

    fields = Table("field", "value", title=f"Recipe {recipe.name}", title_justify="left")
    for name, value in leaves(result.recipe.to_dict()):
        fields.add_row(name, str(value))

    stages = Table("stage", title="Stages", title_justify="left")
    rows: list[tuple[str, Any]] = [
        ("image size, px", lambda s: str(s.stage.image_size)),
        ("tokens per image", lambda s: str(s.tokens)),
        ("batch size", lambda s: f"{s.stage.batch_size:,}"),
        ("epochs", lambda s: "-" if s.stage.epochs is None else f"{s.stage.epochs:g} x {s.stage.samples_per_epoch:,}"),
        ("wall time, min", lambda s: "-" if s.stage.minutes is None else f"{s.stage.minutes:g}"),
        ("samples", lambda s: _count(s.samples)),
        ("steps", lambda s: _count(s.schedule.steps)),
        ("warm-up", lambda s: _warmup(s.schedule)),
        ("peak LR", lambda s: f"{s.schedule.peak_lr:.3g}"),
        ("final LR", lambda s: f"{s.schedule.min_lr:.3g}"),
        ("LPIPS weight", lambda s: f"{s.stage.lpips_weight:g}"),
        ("images reconstructed", lambda s: _share(s.stage.latent_images)),
        ("images decoded to pixels", lambda s: _share(s.stage.pixel_images)),
        ("images captioned", lambda s: _share(s.stage.caption_images)),
        ("training FLOPs per image", lambda s: _flops(s.flops_per_sample)),
        ("training FLOPs", lambda s: "follow the clock" if s.training_flops is None else _flops(s.training_flops)),
    ]
    for stage in result.stages:
        stages.add_column(stage.stage.name, justify="right")
    for name, value in rows:
        stages.add_row(name, *(value(stage) for stage in result.stages))

    parts = Table("part", title="Parts", title_justify="left")
    parts.add_column("parameters", justify="right")
    for stage in result.stages:
        parts.add_column(f"forward FLOPs per image, {stage.stage.image_size} px", justify="right")
    counts = result.parameters
    for name in (*TOWERS, "other", "total"):
        parts.add_row(name, f"{counts[name]:,}", *(_flops(stage.flops.get(name)) for stage in result.stages))
    parts.add_row("VAE (frozen)", f"{counts['vae']:,}", *("" for _ in result.stages))
    for name in ("vae_encoder", "vae_decoder"):
        parts.add_row(name.replace("vae_", "VAE "), "", *(_flops(stage.flops[name]) for stage in result.stages))

    for table in (fields, stages, parts):
        console.print(table)
    known = [stage.training_flops for stage in result.stages if stage.training_flops is not None]
    if known:
        unknown = len(result.stages) - len(known)
        console.print(
            f"Total training FLOPs: {_flops(sum(known))}"
            + (f" and {unknown} stage(s) that follow the clock" if unknown else "")
        )
    return result


def _count(value: int | None) -> str:
    return "follow the clock" if value is None else f"{value:,}"


def _warmup(times: Schedule) -> str:
    if times.warmup_minutes is not None:
        return f"{times.warmup_minutes:g} min"
    return f"{times.warmup_steps or 0:,} steps"


def _share(images: int | None) -> str:
    return "all" if images is None else f"{images:,}"


def _flops(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}FLOPs"
    return f"{value:.0f} FLOPs"
