"""Compute budget for training a generator: FLOPs counted from its layers, time from an assumed MFU (share of a GPU's peak).

    FLOPs per training sample = 3 x (2 x rows x inputs x outputs of every linear layer + 4 N^2 D of every attention)

Encoding the images once is extra, as is sampling for evaluation (`sampling_gpu_hours`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast.generation.ddt import DDT, GeneratorConfig, InContextDDT, build_generator
from ov3fast.generation.layers import RotaryAttention
from ov3fast.recipes.generate import GenerateRecipe
from ov3fast.training.cluster import Chip

SAMPLES, SAMPLING_STEPS = 50_000, 50
"""Samples and steps behind a published FID."""


@dataclass(frozen=True)
class GeneratorPlan:
    """forward_flops: per sample; samples: seen in the whole training; gpu_hours: at the assumed MFU; days: on `gpus` GPUs;
    sampling_gpu_hours: SAMPLES images at SAMPLING_STEPS steps, with no second pass for guidance; cost: None without a price."""

    recipe: str
    chip: str
    gpus: int
    mfu: float
    parameters: int
    forward_flops: float
    steps: int
    samples: int
    gpu_hours: float
    days: float
    sampling_gpu_hours: float
    cost: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forward_flops(generator: DDT | InContextDDT) -> float:
    """Matrix-product FLOPs of one sample's forward pass, run on the generator's device ("meta" computes nothing)."""
    flops = 0.0

    def linear(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal flops
        flops += 2 * inputs[0].numel() * module.out_features  # type: ignore[operator]

    def attention(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        nonlocal flops
        flops += 4 * inputs[0].shape[1] ** 2 * inputs[0].shape[2]

    hooks = [module.register_forward_hook(linear) for module in generator.modules() if isinstance(module, nn.Linear)]
    hooks += [module.register_forward_hook(attention) for module in generator.modules() if isinstance(module, RotaryAttention)]
    config = generator.config
    with torch.no_grad(), next(generator.parameters()).device:
        condition = torch.zeros(1, dtype=torch.int64) if config.classes else torch.zeros(1, 1, config.text_width)
        generator(torch.zeros(1, config.channels, config.height, config.width), torch.zeros(1), condition)
    for hook in hooks:
        hook.remove()
    return flops


def plan_generator(
    recipe: GenerateRecipe,
    gpus: int,
    chip: Chip,
    *,
    mfu: float = 0.4,
    price: float | None = None,
    latents: tuple[int, int, int] = (768, 16, 16),
    classes: int = 1000,
) -> GeneratorPlan:
    """Plan for a class-conditional recipe on latents [C, H, W]. ValueError for fewer than one GPU or an MFU outside (0, 1]."""
    if gpus < 1 or not 0 < mfu <= 1:
        raise ValueError(f"plan: gpus must be at least 1 and mfu in (0, 1], got {gpus} and {mfu}")
    config = GeneratorConfig(
        *latents, recipe.widths, recipe.depths, recipe.heads, classes, in_context=recipe.in_context, predicts_x=recipe.predicts == "x"
    )  # fmt: skip
    with torch.device("meta"):
        generator = build_generator(config)
    flops, samples, rate = forward_flops(generator), recipe.steps * recipe.batch_size, mfu * chip.tflops * 1e12
    hours = 3 * flops * samples / rate / 3600
    sampling = flops * SAMPLES * SAMPLING_STEPS / rate / 3600
    return GeneratorPlan(
        recipe.name, chip.name, gpus, mfu, sum(p.numel() for p in generator.parameters()), flops, recipe.steps, samples, hours,
        hours / gpus / 24, sampling, None if price is None else price * (hours + sampling),
    )  # fmt: skip
