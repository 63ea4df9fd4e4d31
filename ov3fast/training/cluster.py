"""What a recipe takes on a number of GPUs: memory per rank, time of a step, what bounds it, days and cost. Needs no GPU and no data.

    estimate(recipe, gpus=256, chip=CHIPS["h100"]).days

An optimizer step takes as long as the slowest of three things that overlap:

    compute    FLOPs per image * images per GPU / (MFU * peak)
    exchange   bytes that a rank sends / bandwidth: 4 E (W - 1) / W * 2 bytes per image of the batch for the contrastive features and their
               gradients, of both towers, and for the weights' gradients, per parameter,
               ddp   8 (W - 1) / W: the ring all-reduce in float32
               fsdp  (2 g + 4) (W - 1) / W in every micro-batch: weights of g bytes gathered twice, gradients reduce-scattered
               hsdp  as fsdp over the S ranks of a share, at the node's bandwidth where they are in one; and 8 / S (W/S - 1) / (W/S) between shares
    data       images per GPU / the loader's rate, where that is given

The MFU (model FLOPs utilization: FLOPs done over the peak of dense bfloat16) is an assumption, not a measurement. Legend: W ranks, E
width of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ov3fast.recipes.config import Recipe
from ov3fast.training.footprint import Footprint, footprint
from ov3fast.training.plan import StagePlan, make_plan
from ov3fast.training.stage import check_micro_batches


@dataclass(frozen=True)
class Chip:
    """A GPU as its maker's data sheet has it (SXM form)."""

    name: str
    tflops: float
    """Peak of dense bfloat16, 1e12 FLOP/s."""
    memory_gb: float
    """1e9 bytes."""
    node_gb_s: float
    """NVLink, one direction, 1e9 bytes/s."""
    network_gb_s: float
    """Between nodes of eight, one direction, per GPU: a 200 or 400 Gbit/s adapter each."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("a100", 312, 80, 300, 25),
        Chip("h100", 989, 80, 450, 50),
        Chip("h200", 989, 141, 450, 50),
        Chip("b200", 2250, 180, 900, 50),
    )
}
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class StageEstimate:
    """One stage on the cluster. steps, days and gpu_hours are None for a stage that is measured in minutes."""

    stage: str
    micro_batch: int
    """Images per GPU and micro-batch."""
    steps: int | None
    footprint: Footprint
    flops_share: dict[str, float]
    """Part -> its share of the step's FLOPs: towers, VAE encoder, VAE decoder, LPIPS."""
    compute_s: float
    exchange_s: float
    exchange_bytes: float
    """Sent by a rank in a step."""
    data_s: float | None
    images_per_s: float
    """Of the whole cluster."""
    step_s: float
    bound: str
    days: float | None
    gpu_hours: float | None
    suggestions: tuple[str, ...]


@dataclass(frozen=True)
class ClusterPlan:
    """The whole recipe on the cluster."""

    recipe: str
    chip: Chip
    gpus: int
    mfu: float
    stages: tuple[StageEstimate, ...]
    price: float | None
    """Of a GPU-hour."""

    @property
    def days(self) -> float:
        return sum(stage.days or 0.0 for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours or 0.0 for stage in self.stages)

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.gpu_hours

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for stage, values_of_stage in zip(self.stages, values["stages"], strict=True):
            values_of_stage["footprint"]["total"] = stage.footprint.total
        return {**values, "days": self.days, "gpu_hours": self.gpu_hours, "cost": self.cost}


def estimate(
    recipe: Recipe,
    gpus: int,
    chip: Chip,
    *,
    mfu: float = 0.4,
    price: float | None = None,
    loader_rate: float | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> ClusterPlan:
    """The recipe's stages on `gpus` of `chip`, held as recipe.parallel says (hsdp: shares within a node of eight unless shard_size is set).

    loader_rate: images/s that the data loader brings per GPU; None leaves it out of the bound. Raises ValueError where a stage's batch
    can't be shared evenly.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be in (0, 1], got {mfu}")
    for name, value in (("price", price), ("loader_rate", loader_rate)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    recipe = recipe.resolve()
    check_micro_batches(recipe, gpus)
    stages = []
    for number, planned in enumerate(make_plan(recipe).stages):
        progress(planned.stage.name)
        stages.append(_stage(recipe, number, planned, gpus, chip, mfu, loader_rate))
    return ClusterPlan(recipe.name, chip, gpus, mfu, tuple(stages), price)


def _stage(
    recipe: Recipe, number: int, planned: StagePlan, gpus: int, chip: Chip, mfu: float, loader_rate: float | None
) -> StageEstimate:
    stage = planned.stage
    images = stage.batch_size // gpus
    micro_batch = images // recipe.accumulate
    whole = footprint(recipe, number, micro_batch)
    share = {"ddp": 1, "fsdp": gpus}.get(recipe.parallel, recipe.shard_size or min(gpus, GPUS_PER_NODE))
    narrow = 2 if recipe.precision == "bf16" else 4
    memory = whole if share == 1 else whole.shared(share, _gathered(recipe, whole.weights // 4, narrow))
    compute = planned.flops_per_sample * images / (mfu * chip.tflops * 1e12)

    ring = (gpus - 1) / gpus
    features = 4 * recipe.model.vision.embed_dim * stage.batch_size
    near, far = chip.node_gb_s * 1e9, (chip.node_gb_s if gpus <= GPUS_PER_NODE else chip.network_gb_s) * 1e9
    sent = ring * 2 * 2 * features
    exchange = sent / far
    if share > 1:
        passes = 2 if recipe.reshard else 1
        within = recipe.accumulate * (share - 1) / share * (whole.weights // 4 * passes * narrow + whole.gradients)
        sent, exchange = sent + within, exchange + within / (near if share <= GPUS_PER_NODE else far)
    copies = gpus // share
    between = 2 * (copies - 1) / copies * memory.gradients
    sent, exchange = sent + between, exchange + between / far
    data = None if loader_rate is None else images / loader_rate

    parts = {"compute": compute, "exchange": exchange, **({} if data is None else {"data": data})}
    bound = max(parts, key=lambda name: parts[name])
    shares = {name: flops / planned.flops_per_sample for name, flops in planned.flops_by_part.items()}
    step = parts[bound]
    if bound == "compute":
        bound = f"compute: {max(shares, key=lambda name: shares[name])}"
    steps = planned.schedule.steps
    days = None if steps is None else steps * step / 86400
    return StageEstimate(
        stage=stage.name,
        micro_batch=micro_batch,
        steps=steps,
        footprint=memory,
        flops_share=shares,
        compute_s=compute,
        exchange_s=exchange,
        exchange_bytes=sent,
        data_s=data,
        images_per_s=stage.batch_size / step,
        step_s=step,
        bound=bound,
        days=days,
        gpu_hours=None if days is None else 24 * days * gpus,
        suggestions=tuple(_suggestions(recipe, memory, chip, micro_batch, shares, bound)),
    )


def _gathered(recipe: Recipe, parameters: int, narrow: int) -> int:
    """Bytes of the weights that FSDP holds gathered: those outside the blocks, and two blocks, or all."""
    if not recipe.reshard:
        return narrow * parameters
    towers = [
        (part.width, part.mlp_dim, part.depth)
        for part in (recipe.model.vision, recipe.model.decoder, recipe.model.text, recipe.model.caption)
    ]
    blocks = [(4 * width * width + 2 * width * hidden, depth) for width, hidden, depth in towers]
    return narrow * (parameters - sum(size * depth for size, depth in blocks) + 2 * max(size for size, _ in blocks))


def _suggestions(
    recipe: Recipe, memory: Footprint, chip: Chip, micro_batch: int, shares: dict[str, float], bound: str
) -> list[str]:
    """What would help, by the recipe's fields."""
    found, capacity = [], 0.9 * chip.memory_gb * 1e9  # the rest is the allocator's, NCCL's and CUDA's own
    room = capacity - (memory.total - memory.activations)
    if memory.total > capacity:
        if not recipe.activation_checkpointing:
            found.append("does not fit: activation_checkpointing")
        elif room > 0:
            found.append(f"does not fit: accumulate {recipe.accumulate * -(-memory.activations // int(room))} or more GPUs")
        elif recipe.parallel == "ddp":
            found.append("does not fit: weights, gradients and moments alone exceed the memory; parallel fsdp shares them")
        else:
            found.append("does not fit: a process's share of weights, gradients and moments exceeds the memory")
    elif memory.total < capacity / 2:
        most = int(micro_batch * room / memory.activations)
        if recipe.accumulate > 1:
            found.append(f"memory is left: a GPU takes {most} images at once, so accumulate less")
        elif recipe.activation_checkpointing:
            found.append(f"memory is left (a GPU takes {most} images): try without activation_checkpointing")
    if not recipe.cache_latents and shares.get("VAE encoder", 0.0) >= 0.1:
        found.append(f"latents kept from a former pass (cache_latents) save {shares['VAE encoder']:.0%} of the FLOPs")
    if shares.get("VAE decoder", 0.0) + shares.get("LPIPS", 0.0) >= 0.4:
        found.append("most FLOPs are the pixel losses': fewer pixel_images")
    if bound == "exchange":
        found.append("the exchange of gradients is slower than the compute: a larger batch, or fewer GPUs")
    if bound == "data":
        found.append("the loader is slower than the compute: more workers, or cache_latents")
    return found
