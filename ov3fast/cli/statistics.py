"""ov3fast statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ov3fast.cli.options import ImagesOptions, parse


@dataclass(kw_only=True)
class Statistics(ImagesOptions):
    """Compute the exact per-element mean and variance of image tokens, with which a generator's latents are normalized."""

    out: Path
    """.safetensors file to write: mean and var, float64 [C, H, W]."""


def run(arguments: list[str]) -> int:
    given = parse(Statistics, arguments, "statistics")
    from ov3fast.generation.statistics import token_statistics
    from ov3fast.inference import load_model

    if given.out.suffix != ".safetensors":
        raise ValueError(f"statistics: --out must end in .safetensors, got {given.out}")
    model = load_model(given.model, vae=given.vae, device=given.device)
    found = token_statistics(
        model, given.images, out=given.out, image_size=given.image_size, batch_size=given.batch_size, workers=given.workers, progress=True
    )  # fmt: skip
    shape = " x ".join(map(str, found.mean.shape))
    print(f"{found.about['images']} images ({found.about['skipped']} skipped), {shape} -> {given.out}")
    return 0
