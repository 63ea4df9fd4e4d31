"""What a generator makes, measured and shown: generate.json and generate.html in its run.

For every class: samples, beside each the nearest picture of the training set, so that copies show. Figures are FID-style (protocol
"squeezenet") and stand between two others of the same kind: the reconstructions of the training pictures (what no generator over these
tokens goes below) and uniform noise in place of tokens (what knows nothing).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast.data.assets import fetch
from ov3fast.evaluation.palette import png_data, scale_css
from ov3fast.evaluation.report import TEMPLATES
from ov3fast.generation import fid, frechet
from ov3fast.generation.moments import FeatureMoments
from ov3fast.generation.saved import SavedGenerator
from ov3fast.generation.training import read_data
from ov3fast.inference.load import load_model
from ov3fast.io import atomic_write
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.recipes.generate import GenerateRecipe

SHOWN = 10
"""Pairs of sample and nearest training picture per class."""
BATCH = 64


def tiled(pictures: Tensor, gap: int = 2) -> Tensor:
    """uint8 [N, 3, H, W] -> one picture of about square, white between."""
    columns = math.ceil(len(pictures) ** 0.5)
    rows = math.ceil(len(pictures) / columns)
    height, width = (side + gap for side in pictures.shape[2:])
    board = torch.full((3, rows * height - gap, columns * width - gap), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        board[:, top : top + height - gap, left : left + width - gap] = picture
    return board


def write_generation_report(
    recipe: GenerateRecipe, *, samples: int = 512, seed: int = 1, weight: float = 1.5, steps: int = 50
) -> dict[str, Any]:
    """Samples a class-conditional run's generator, with classes as frequent as in training, and writes both files. Returns the figures."""
    saved = SavedGenerator.load(recipe.run_dir)
    model = load_model(recipe.model, vae=recipe.vae)
    images, names, _ = read_data(recipe, model)
    extractor = fid.build_extractor(fid.protocol_named("squeezenet"), None, fetch)
    labels = torch.tensor([saved.label_of(name) for name in names])
    chosen = labels[torch.linspace(0, len(labels) - 1, samples).long()]
    chosen = chosen.sort().values
    pictures = _sampled(saved, model, chosen, seed, weight, steps)
    real, made = _features(images, extractor), _features(pictures, extractor)
    reconstructed = _features(_reconstructed(model, images), extractor)
    nothing = _features(
        saved.pictures(model, saved.statistics.denormalize(torch.rand(min(samples, 256), *saved.statistics.mean.shape))),
        extractor,
    )
    reference = FeatureMoments.of(real)
    figures: dict[str, Any] = {
        "protocol": "squeezenet",
        "samples": samples,
        "training_pictures": len(images),
        "seed": seed,
        "steps": steps,
        "guidance": weight,
        "fid_style": frechet.frechet_of(FeatureMoments.of(made), reference),
        "fid_style_of_reconstructions": frechet.frechet_of(FeatureMoments.of(reconstructed), reference),
        "fid_style_of_noise": frechet.frechet_of(FeatureMoments.of(nothing), reference),
    }
    figures |= frechet.precision_recall(made, real)._asdict()
    place, distance = _nearest(made, real)
    own, _ = _nearest_of_itself(real)
    figures["copies"] = float((distance < own.quantile(0.01)).float().mean())
    figures["class_of_nearest"] = float((labels[place] == chosen).float().mean())
    figures["class_of_nearest_by_chance"] = float((labels.bincount() / len(labels)).square().sum())
    with atomic_write(recipe.run_dir / "generate.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=1))
    groups = []
    for label, name in enumerate(saved.classes):
        rows = (chosen == label).nonzero()[:SHOWN, 0].tolist()
        pairs = [(png_data(pictures[i]), png_data(images[place[i]])) for i in rows]
        if pairs:
            groups.append((name, int((labels == label).sum()), pairs))
    _write_page(recipe.run_dir / "generate.html", figures, groups)
    return figures


def _sampled(saved: SavedGenerator, model: OpenVision3, labels: Tensor, seed: int, weight: float, steps: int) -> Tensor:
    parts = []
    for rows in torch.arange(len(labels)).split(BATCH):
        latents = saved.sample(labels[rows], rows.tolist(), seed=seed, weight=weight, steps=steps)
        parts.append(saved.pictures(model, latents))
    return torch.cat(parts)


def _reconstructed(model: OpenVision3, images: Tensor) -> Tensor:
    parts = [model.reconstruct(batch.float() / 127.5 - 1) for batch in images.split(BATCH)]
    return ((torch.cat(parts) + 1) * 127.5).floor().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def _features(images: Tensor, extractor: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Tensor:
    return torch.cat([extractor(batch)[0].float() for batch in images.split(BATCH)])


def _nearest(features: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the nearest one's place and distance."""
    distance, place = torch.cdist(features, of).min(1)
    return place, distance


def _nearest_of_itself(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to the nearest other row, and its place."""
    distances = torch.cdist(features, features).fill_diagonal_(float("inf"))
    found = distances.min(1)
    return found.values, found.indices


def _write_page(path: Path, figures: dict[str, Any], groups: list[Any]) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    rows = [
        (name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in figures.items()
    ]
    page = environment.get_template("generate.html").render(figures=rows, groups=groups, error_scale=scale_css())
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
