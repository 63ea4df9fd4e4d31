"""What a run prints before its first step: how the model is sharded, the memory that each process needs, and the plan."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ov3fast.models.openvision3 import PARTS, OpenVision3
from ov3fast.recipes.config import Recipe
from ov3fast.training.footprint import footprint
from ov3fast.training.optimizer import AdamW
from ov3fast.training.parallel import Parallel, own
from ov3fast.training.plan import flops_by_part
from ov3fast.training.schedule import schedule
from ov3fast.training.stage import length


def announce(recipe: Recipe, parallel: Parallel, optimizer: AdamW, stage: int) -> Iterator[str]:
    """Lines of text. stage: the one to train next. Activations are estimated for GPUs only, where they set the peak; it takes seconds."""
    ranks = parallel.ranks
    yield f"mesh: {parallel.describe()}, {ranks.device.type}"
    parts = memory(parallel, optimizer)
    if ranks.device.type == "cuda":
        images = max(s.batch_size for s in recipe.stages[stage:]) // (ranks.world * recipe.accumulate)
        parts["activations"] = max(
            footprint(recipe, number, images).activations for number in range(stage, len(recipe.stages))
        )  # fmt: skip
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)
    not_counted = "" if "activations" in parts else ", and activations"
    yield f"memory of each process: {_bytes(sum(parts.values()))} ({listed}){not_counted}"
    for planned in recipe.stages[stage:]:
        flops = sum(flops_by_part(recipe, planned).values())
        micro = planned.batch_size // (ranks.world * recipe.accumulate)
        yield (
            f"plan: {planned.name}, {length(schedule(planned, recipe.optimizer.min_lr))} of {planned.batch_size:,} images at "
            f"{planned.image_size} px, {recipe.accumulate} x {micro} in each process, {flops / 1e9:,.1f} GFLOPs an image"
        )


def memory(parallel: Parallel, optimizer: AdamW) -> dict[str, int]:
    """Bytes of a process by purpose, without activations."""
    model = parallel.model
    shares = sum(_size(own(p)) for p in optimizer.parameters.values())
    states = {
        name: sum(_size(own(optimizer.state[p][name])) for p in optimizer.parameters.values())
        for name in ("exp_avg", "exp_avg_sq")
    }
    vae = model.vae
    return {
        "weights": shares,
        "gathered weights": _gathered(model, parallel) if parallel.sharded else 0,
        "gradients": shares,
        "moments": sum(states.values()),
        "average": 0 if optimizer.ema is None else sum(_size(own(value)) for value in optimizer.ema.values()),
        "frozen": 0 if vae is None else sum(_size(p) for p in vae.parameters()),
    }


def _gathered(model: OpenVision3, parallel: Parallel) -> int:
    """What is outside the blocks, and of the blocks two at a time, or all where they are kept."""
    blocks = [_numel(block) for part in PARTS for block in getattr(model, part).transformer.blocks]
    inside = 2 * max(blocks, default=0) if parallel.reshards else sum(blocks)
    return parallel.bytes_gathered * (_numel(model) - sum(blocks) + inside)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _size(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
