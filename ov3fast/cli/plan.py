"""ov3fast plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov3fast.cli.options import parse

if TYPE_CHECKING:
    from ov3fast.training.cluster import ClusterPlan, StageEstimate


@dataclass
class PlanOptions:
    """Estimate a recipe on a number of GPUs: memory per rank, step time and bottleneck, days and cost. Needs no GPU and no data."""

    recipe: str = "base"
    """demo, base, large, generate-base, or a .json or .yaml file."""
    gpus: int = 8
    """Processes, one GPU each, in nodes of eight."""
    device: str = "h100"
    """Kind of GPU: a100, h100, h200 or b200."""
    mfu: float = 0.4
    """Assumed model FLOPs utilization, the fraction of peak that training reaches."""
    price: float | None = None
    """Price of a GPU-hour, to show the cost."""
    loader_rate: float | None = None
    """Images/s per GPU that the data loader delivers; without it only the required rate is shown."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: list[str]) -> int:
    given = parse(PlanOptions, arguments, "plan")
    from rich.console import Console

    from ov3fast import terminal
    from ov3fast.recipes import SUFFIXES, get_recipe, read_recipe
    from ov3fast.recipes.generate import GENERATE_RECIPES
    from ov3fast.training.cluster import CHIPS, estimate

    if given.device not in CHIPS:
        raise ValueError(f"--device must be one of {', '.join(CHIPS)}; got {given.device!r}")
    if given.recipe in GENERATE_RECIPES:
        return _generator(given)
    recipe = read_recipe(given.recipe) if Path(given.recipe).suffix in SUFFIXES else get_recipe(given.recipe)
    with Console(stderr=True).status("") as status:
        result = estimate(
            recipe, given.gpus, CHIPS[given.device], mfu=given.mfu, price=given.price, loader_rate=given.loader_rate,
            progress=lambda stage: status.update(f"stage {stage}: its step on fake tensors"),
        )  # fmt: skip
    if given.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        _show(result, terminal.console())
    return 0


def _generator(given: PlanOptions) -> int:
    """Plans a generator's training on tokens of 256 px images with 1000 classes."""
    from ov3fast import terminal
    from ov3fast.generation.plan import SAMPLES, SAMPLING_STEPS, plan_generator
    from ov3fast.recipes.generate import GENERATE_RECIPES
    from ov3fast.training.cluster import CHIPS

    recipe = GENERATE_RECIPES[given.recipe]
    plan = plan_generator(recipe, given.gpus, CHIPS[given.device], mfu=given.mfu, price=given.price)
    if given.json:
        print(json.dumps(plan.to_dict(), indent=1))
        return 0
    console = terminal.console()
    for line in (
        f"Recipe {plan.recipe} on {plan.gpus} x {plan.chip}, assuming {plan.mfu:.0%} MFU, latents 768 x 16 x 16, 1000 classes",
        f"  {plan.parameters / 1e6:,.0f} M parameters, {plan.forward_flops / 1e9:,.0f} GFLOP a pass",
        f"  {plan.steps:,} steps, {plan.samples / 1e6:,.1f} M samples: {plan.days:,.2f} days, {plan.gpu_hours:,.0f} GPU-hours",
        f"  sampling {SAMPLES:,} pictures at {SAMPLING_STEPS} steps: {plan.sampling_gpu_hours:,.0f} GPU-hours",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    if plan.cost is not None:
        console.print(f"  cost {plan.cost:,.0f}", highlight=False)
    return 0


def _show(plan: ClusterPlan, console: Any) -> None:
    from rich.table import Table

    title = f"Recipe {plan.recipe} on {plan.gpus} x {plan.chip.name}, assuming {plan.mfu:.0%} MFU"
    table = Table("", title=title, title_justify="left")
    for stage in plan.stages:
        table.add_column(stage.stage, justify="right")
    for name, cell in _ROWS:
        table.add_row(name, *(cell(stage) for stage in plan.stages))
    console.print(table)
    for stage in plan.stages:
        for suggestion in stage.suggestions:
            console.print(f"{stage.stage}: {suggestion}", highlight=False)
    if plan.gpu_hours:
        cost = "" if plan.cost is None else f", cost {plan.cost:,.0f}"
        console.print(f"Total: {plan.days:,.2f} days, {plan.gpu_hours:,.0f} GPU-hours{cost}", highlight=False)


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _share(stage: StageEstimate, part: str) -> str:
    return f"{stage.flops_share.get(part, 0.0):.0%}"


def _seconds(value: float | None) -> str:
    return "not given" if value is None else f"{1e3 * value:,.1f} ms"


_ROWS: list[tuple[str, Any]] = [
    ("images per GPU at once", lambda s: str(s.micro_batch)),
    ("steps", lambda s: "follow the clock" if s.steps is None else f"{s.steps:,}"),
    ("memory per GPU", lambda s: _gb(s.footprint.total)),
    ("  weights, gradients", lambda s: _gb(s.footprint.weights + s.footprint.gradients)),
    ("  AdamW's moments, EMA", lambda s: _gb(s.footprint.moments + s.footprint.ema)),
    ("  frozen VAE, LPIPS", lambda s: _gb(s.footprint.frozen)),
    ("  activations, at their peak", lambda s: _gb(s.footprint.activations)),
    ("FLOPs: towers", lambda s: _share(s, "towers")),
    ("FLOPs: VAE encoder", lambda s: _share(s, "VAE encoder")),
    ("FLOPs: VAE decoder", lambda s: _share(s, "VAE decoder")),
    ("FLOPs: LPIPS", lambda s: _share(s, "LPIPS")),
    ("compute", lambda s: _seconds(s.compute_s)),
    ("exchange", lambda s: f"{_seconds(s.exchange_s)}, {_gb(s.exchange_bytes)}"),
    ("data", lambda s: _seconds(s.data_s)),
    ("step is bound by", lambda s: s.bound),
    ("images/s, all GPUs", lambda s: f"{s.images_per_s:,.0f}"),
    ("days", lambda s: "follow the clock" if s.days is None else f"{s.days:,.2f}"),
    ("GPU-hours", lambda s: "follow the clock" if s.gpu_hours is None else f"{s.gpu_hours:,.0f}"),
]
