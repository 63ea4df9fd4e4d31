"""Metrics and samples of a generator: generate.json and generate.html in its run folder.

The same metrics are computed for four sets of equal size, which puts the generator between a control and chance:

    generated        samples, with the class frequencies of the training set
    held out         real images not trained on
    reconstructed    training images through encoder and decoders: upper bound for generators over these tokens, all copies
    noise            noise with the tokens' mean and variance in place of tokens

Frechet distances are FID-style (protocol "squeezenet"). An image counts as a copy if it is closer to a training image (or its
mirror image) than all but COPY_SHARE of the held-out images are, in features or in pixels. The rate of copies among
reconstructions shows how many copies are detected; among held-out images it is the false-positive rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ov3fast.data.assets import fetch
from ov3fast.data.store import resolve
from ov3fast.evaluation.palette import png_data, scale_css
from ov3fast.evaluation.pictures import read_pictures, spread
from ov3fast.evaluation.templates import template
from ov3fast.generation import fid, flow, frechet
from ov3fast.generation.moments import FeatureMoments
from ov3fast.generation.robustness import as_pictures, robustness
from ov3fast.generation.saved import Precision, SavedGenerator
from ov3fast.inference.load import load_model
from ov3fast.io import atomic_write
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.recipes.generate import GenerateRecipe

SHOWN = 8
"""Samples shown per class."""
COPY_SHARE = 0.05
BATCH = 64
PIXELS = 32
"""Side that images are resized to for pixel distances."""
COLUMNS = {
    "fid_style": "FID-style",
    "precision": "precision",
    "recall": "recall",
    "class_of_nearest": "class of nearest",
    "copies_in_features": "copies (features)",
    "copies_in_pixels": "copies (pixels)",
}


class Looks(NamedTuple):
    """What images are compared by: features [N, D], and pixels [N, P] in [0, 1]."""

    features: Tensor
    pixels: Tensor


class Nearest(NamedTuple):
    """Index of and distance to each image's nearest training image, in features and in pixels; all [N]."""

    by_features: Tensor
    feature_distance: Tensor
    by_pixels: Tensor
    pixel_distance: Tensor


def tiled(pictures: Tensor, gap: int = 2, columns: int | None = None) -> Tensor:
    """Tile images uint8 [N, 3, H, W] into one with white gaps, roughly square if columns is None."""
    columns = columns or math.ceil(len(pictures) ** 0.5)
    rows = math.ceil(len(pictures) / columns)
    height, width = (side + gap for side in pictures.shape[2:])
    board = torch.full((3, rows * height - gap, columns * width - gap), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        board[:, top : top + height - gap, left : left + width - gap] = picture
    return board


def _pictures(paths: Sequence[str], recipe: GenerateRecipe, model: OpenVision3) -> tuple[Tensor, list[str]]:
    """Images uint8 [N, 3, S, S] and their classes."""
    pictures = read_pictures([resolve(path) for path in paths], model.config.vision.image_size)
    return pictures.images, pictures.column(recipe.class_field)


def write_generation_report(
    recipe: GenerateRecipe, *, samples: int = 600, seed: int = 1, weight: float = 2.0, steps: int = 50
) -> dict[str, Any]:
    """Sample a class-conditional run's generator and write both files. Returns the metrics, which `print_figures` prints.

    samples: maximum images per set, also limited by the number of held-out images.
    """
    saved = SavedGenerator.load(recipe.run_dir)
    model = load_model(recipe.model, vae=recipe.vae)
    (images, names), (held, held_names) = (_pictures(paths, recipe, model) for paths in (recipe.data, recipe.heldout))
    held, held_names = _known(held, held_names, saved.classes)
    extractor = fid.build_extractor(fid.protocol_named("squeezenet"), None, fetch)
    real, labels = _looks(images, extractor), torch.tensor([saved.label_of(name) for name in names])
    mirrored = _looks(images.flip(-1), extractor)
    pool = Looks(*(torch.cat(pair) for pair in zip(real, mirrored, strict=True)))

    kept = spread(len(held), min(samples, len(held)))
    count = len(kept)
    wanted = labels[spread(len(labels), count)].sort().values
    shown = torch.cat([wanted, _missing(wanted, len(saved.classes))])
    generated = _sampled(saved, model, shown, seed, weight, steps, recipe.precision)
    noise = saved.statistics.denormalize(flow.noise_of(seed + 1, range(count), saved.statistics.mean.shape))
    rows = spread(len(images), count)
    sets = {
        "generated": (generated[:count], wanted),
        "held out": (held[kept], torch.tensor([saved.label_of(held_names[i]) for i in kept])),
        "reconstructed": (_reconstructed(model, images[rows]), labels[rows]),
        "noise": (torch.cat([saved.pictures(model, part) for part in noise.split(BATCH)]), wanted),
    }
    looks = {name: _looks(pictures, extractor) for name, (pictures, _) in sets.items()}
    near = {name: _nearest(of, pool) for name, of in looks.items()}
    limits = [
        float(distance.quantile(COPY_SHARE))
        for distance in (near["held out"].feature_distance, near["held out"].pixel_distance)
    ]
    reference = FeatureMoments.of(real.features)
    figures: dict[str, Any] = {
        "protocol": "squeezenet",
        "pictures_per_set": count,
        "training_pictures": len(images),
        "seed": seed,
        "steps": steps,
        "guidance": weight,
        "class_by_chance": float((labels.bincount() / len(labels)).square().sum()),
        "sets": {name: _measured(looks[name], near[name], sets[name][1], real, labels, reference, limits) for name in sets},
    }
    borne = robustness(model, held[kept], lambda pictures: _looks(pictures, extractor).features, reference)
    figures["robustness"] = [{"sigma": row.sigma, "psnr": row.psnr, "fid_style": row.fid_style} for row in borne]
    with atomic_write(recipe.run_dir / "generate.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=1))

    found, mirror = _nearest(_looks(generated, extractor), pool), torch.cat([images, images.flip(-1)])
    groups = []
    for label, name in enumerate(saved.classes):
        places = (shown == label).nonzero()[:SHOWN, 0].tolist()
        columns = [
            [png_data(picture) for picture in (generated[i], mirror[found.by_features[i]], mirror[found.by_pixels[i]])]
            for i in places
        ]
        groups.append({"name": name, "count": int((labels == label).sum()), "columns": columns})
    strips = [[png_data(picture) for picture in row.pictures[:SHOWN]] for row in borne]
    _write_page(recipe.run_dir / "generate.html", figures, groups, [png_data(p) for p in held[kept][:SHOWN]], strips)
    return figures


def print_figures(figures: dict[str, Any]) -> None:
    """Print the report's two tables."""
    for head, rows in tables(figures):
        widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
        for line in (head, *rows):
            print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))))  # fmt: skip
        print()


def tables(figures: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """(head, rows) of two tables: metrics of the sets, and robustness of the decoders to noise."""
    rows = [[name, *(_cell(key, values[key]) for key in COLUMNS)] for name, values in figures["sets"].items()]
    chance = {"class_of_nearest": figures["class_by_chance"]}
    rows.append(["chance", *(_cell(key, chance[key]) if key in chance else "" for key in COLUMNS)])
    count = figures["pictures_per_set"]
    sets = ([f"{count} pictures each", *COLUMNS.values()], rows)
    borne = [[f"sigma {row['sigma']:g}", f"{row['psnr']:.2f} dB", f"{row['fid_style']:.0f}"] for row in figures["robustness"]]
    return [sets, (["held out, noise on tokens", "PSNR", "FID-style"], borne)]


def _cell(key: str, value: float) -> str:
    return f"{value:.0f}" if key == "fid_style" else f"{100 * value:.1f} %"


def _known(images: Tensor, names: list[str], classes: list[str]) -> tuple[Tensor, list[str]]:
    """Images, and their class names, of classes the generator was trained on."""
    rows = [i for i, name in enumerate(names) if name in classes]
    return images[rows], [names[i] for i in rows]


def _missing(wanted: Tensor, classes: int) -> Tensor:
    """Labels of the extra samples needed for SHOWN per class."""
    counts = wanted.bincount(minlength=classes)
    return torch.arange(classes).repeat_interleave((SHOWN - counts).clamp(min=0))


def _sampled(
    saved: SavedGenerator, model: OpenVision3, labels: Tensor, seed: int, weight: float, steps: int, precision: Precision
) -> Tensor:
    parts = []
    for rows in torch.arange(len(labels)).split(BATCH):
        latents = saved.sample(labels[rows], rows.tolist(), seed=seed, weight=weight, steps=steps, precision=precision)
        parts.append(saved.pictures(model, latents))
    return torch.cat(parts)


def _reconstructed(model: OpenVision3, images: Tensor) -> Tensor:
    return torch.cat([as_pictures(model.reconstruct(batch.float() / 127.5 - 1)) for batch in images.split(BATCH)])


@torch.inference_mode()
def _looks(images: Tensor, extractor: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Looks:
    features = torch.cat([extractor(batch)[0].float() for batch in images.split(BATCH)])
    small = torch.nn.functional.interpolate(images / 255, (PIXELS, PIXELS), mode="area")
    return Looks(features, small.flatten(1))


def _nearest(looks: Looks, pool: Looks) -> Nearest:
    found = [torch.cdist(own, of).min(1) for own, of in zip(looks, pool, strict=True)]
    return Nearest(found[0].indices, found[0].values, found[1].indices, found[1].values)


def _measured(
    looks: Looks, near: Nearest, wanted: Tensor, real: Looks, labels: Tensor, reference: FeatureMoments, limits: list[float]
) -> dict[str, float]:
    agrees = labels[near.by_features % len(labels)] == wanted
    return {
        "fid_style": frechet.frechet_of(FeatureMoments.of(looks.features), reference),
        **frechet.precision_recall(looks.features, real.features)._asdict(),
        "class_of_nearest": float(agrees.float().mean()),
        "copies_in_features": float((near.feature_distance < limits[0]).float().mean()),
        "copies_in_pixels": float((near.pixel_distance < limits[1]).float().mean()),
    }


def _write_page(path: Path, figures: dict[str, Any], groups: list[Any], originals: list[str], strips: list[list[str]]) -> None:
    sets, noise = tables(figures)
    page = template("generate.html").render(
        figures=figures, sets=sets, noise=noise, groups=groups, originals=originals, strips=strips, copy_share=f"{COPY_SHARE:.0%}",
        error_scale=scale_css(),
    )  # fmt: skip
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
