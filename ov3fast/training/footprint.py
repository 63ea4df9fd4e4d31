"""FLOPs and peak memory of a stage's step, found by running the trainer's own step on fake tensors: no data, weights or memory needed.

    footprint(recipe, stage=0, images=32).activations         # bytes

Fake tensors have a size and a device but no values. Every storage that an operator makes is counted from its allocation to its release,
and FlopCounterMode counts the products. What a kernel allocates for itself and frees before it returns (workspaces) is not seen.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ov3fast.losses import Objective
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.flops import resolve_vae_config
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.perceptual import LPIPS
from ov3fast.models.vae import FrozenVAE
from ov3fast.recipes.config import Recipe, Stage
from ov3fast.training.distributed import Ranks
from ov3fast.training.parallel import Parallel
from ov3fast.training.plan import texts_and_paired
from ov3fast.training.step import MicroBatch, Step
from ov3fast.training.timing import Timer


@dataclass(frozen=True)
class Footprint:
    """One process's share of a step. Bytes."""

    weights: int
    """Of the model, float32."""
    gradients: int
    moments: int
    """AdamW's two."""
    ema: int
    frozen: int
    """VAE and LPIPS."""
    activations: int
    """Peak of everything else that is alive at once while a micro-batch is encoded, run forward and run backward."""
    flops_per_image: float
    """Of the step, VAE and LPIPS included."""
    gathered: int = 0
    """Weights put together from their shares, with FSDP."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.ema + self.frozen + self.activations + self.gathered

    def shared(self, by: int, gathered: int) -> Footprint:
        """With weights, gradients, moments and average dealt over `by` processes."""
        shares = {name: -(-getattr(self, name) // by) for name in ("weights", "gradients", "moments", "ema")}
        return dataclasses.replace(self, **shares, gathered=gathered)


def footprint(recipe: Recipe, stage: int, images: int) -> Footprint:
    """The step of stage number `stage` with micro-batches of `images` images, on a single process.

    With recipe.accumulate above 1 two micro-batches are run, which is as much as is ever alive. A restricted vocabulary is not known
    without the captions; the config's counts.
    """
    if images < 1:
        raise ValueError(f"footprint: images must be at least 1, got {images}")
    part, config = recipe.stages[stage], recipe.stage_objective(recipe.stages[stage])
    with torch.device("meta"):
        model = OpenVision3(recipe.model)
        vae = FrozenVAE.from_config(resolve_vae_config(recipe.model))
        lpips = LPIPS(recipe.lpips.backbone) if config.lpips_weight > 0 and config.rec_weight > 0 else None
    vae = vae.to(torch.float32 if recipe.vae_dtype == "fp32" else torch.bfloat16)
    model.set_vae(vae)
    model.train()
    model.set_activation_checkpointing(recipe.activation_checkpointing, recipe.recompute)
    ranks = Ranks(0, 1, torch.device("cpu"))
    step = Step(
        Parallel(model, recipe, ranks), Objective(config, lpips), Timer(ranks.device),
        bf16=recipe.precision == "bf16", exact_contrastive=recipe.contrastive_over == "batch",
    )  # fmt: skip
    count = min(recipe.accumulate, 2)
    frozen = [vae] if lpips is None else [vae, lpips]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (model, *frozen):
            _make_fake(module)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        live, flops = _LiveBytes(), FlopCounterMode(display=False)
        with flops, live:  # the other way round the counter would take operators apart first
            micro_batches = [blank_micro_batch(recipe, part, images, vae) for _ in range(count)]
            step(micro_batches)
    weights = _bytes(model)
    return Footprint(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        ema=0 if recipe.optimizer.ema_decay is None else weights,
        frozen=sum(_bytes(module) for module in frozen),
        activations=live.peak,
        flops_per_image=flops.get_total_flops() / (count * images),
    )


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that operators make within the block and that are still referenced; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _make_fake(module: nn.Module) -> None:
    """Replaces parameters and buffers on the meta device by fake ones on the CPU; within a FakeTensorMode."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def blank_micro_batch(recipe: Recipe, stage: Stage, images: int, vae: FrozenVAE) -> MicroBatch:
    """What `Inputs.next` gives for `images` images, all zeros; the VAE encodes the images here, unless latents are cached."""
    config, objective = recipe.model, recipe.stage_objective(stage)
    per_image, paired = texts_and_paired(recipe)
    texts = max(1, round(images * per_image))

    def share(limit: int | None, whole: float) -> int:
        return round(whole) if limit is None else max(1, limit * images // stage.batch_size)

    def rows(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    side = stage.image_size // VAE_STRIDE
    latents = torch.zeros(images, config.vision.in_channels, side, side)
    if not recipe.cache_latents:
        with torch.no_grad():
            pixels = torch.zeros(images, 3, stage.image_size, stage.image_size)
            latents = vae.encode(pixels, "mean", config.latent_convention).float()
            del pixels
    contrasted = objective.und_weight > 0 and objective.contrastive_weight > 0
    captioned = objective.und_weight > 0 and objective.caption_weight > 0 and stage.caption_images != 0
    reconstructed = share(stage.latent_images, images)
    decoded = share(stage.pixel_images, reconstructed) if objective.needs_pixels and stage.pixel_images != 0 else 0
    return MicroBatch(
        keys=[""] * images,
        latents=latents,
        text_ids=rows(texts, config.text.context_length) if contrasted or config.caption.text_prefix else None,
        pairs=rows(round(images * paired / texts), texts) if texts != images else None,
        caption_ids=rows(images, config.caption.length) if captioned else None,
        caption_rows=rows(share(stage.caption_images, images * paired)) if captioned else None,
        latent_rows=None if stage.latent_images is None else rows(reconstructed),
        pixel_rows=rows(decoded) if decoded else None,
        images=torch.zeros(decoded, 3, stage.image_size, stage.image_size) if decoded else None,
        sigma=torch.zeros(reconstructed) if config.tau > 0 else None,
        rng=rows(2),
    )


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in itertools.chain(module.parameters(), module.buffers()))
