"""A generator's training tokens: every image in the recipe's shards and, with `flip`, its mirror image, encoded once.

Each process encodes a part. Tokens are kept in memory as float32 or, with `token_cache`, as bfloat16 in a folder, which later
runs with the same model and data reuse:

    tokens.bf16          [rows, C, H, W] as encoded, not normalized: row r is sample r of the shards, row samples + r its mirror
    texts.bf16           [samples, L, E], the text tower's tokens, for condition "text"
    tokens.safetensors   written last: readable samples, their labels, statistics; as metadata: key, shapes, classes
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ov3fast.data.shards import ShardDataset
from ov3fast.data.skips import DataError, SkipCounter
from ov3fast.data.store import resolve
from ov3fast.evaluation.pictures import Pictures, as_pictures, readable
from ov3fast.evaluation.reconstruction import to_model_range
from ov3fast.generation.moments import ElementMoments
from ov3fast.generation.statistics import LatentStatistics, as_latents
from ov3fast.io import atomic_write, check_writable_folder, naming_full_disk
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.recipes.generate import GenerateRecipe
from ov3fast.training.distributed import ALONE, Ranks
from ov3fast.training.latents import weights_hash

LATENTS, TEXTS, INDEX = "tokens.bf16", "texts.bf16", "tokens.safetensors"
CHUNK, SKIP_BUDGET = 64, 0.1
PREPROCESS = "white background, shorter side resized, centre crop"


@dataclass(frozen=True)
class Tokens:
    """latents: [R, C, H, W] as encoded. condition: labels int64 [P] or text tokens [P, L, E]. rows: int64 [N, 2], each sample's
    row in latents and in condition. classes: names of the labels, [] for texts."""

    latents: Tensor
    condition: Tensor
    rows: Tensor
    classes: list[str]
    statistics: LatentStatistics

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized latents float32 [B, C, H, W], and their conditions: labels int64 [B], or text tokens float32 [B, L, E]."""
        latents, condition = self.rows[samples].unbind(1)
        chosen = self.condition[condition]
        return self.statistics.normalize(self.latents[latents].float()), chosen if self.classes else chosen.float()


def encode_tokens(recipe: GenerateRecipe, model: OpenVision3, progress: bool = False, ranks: Ranks = ALONE) -> Tokens:
    """All tokens of recipe.data, on every rank. DataError if a sample has no class; ValueError if token_cache holds tokens of
    another model or other data."""
    shards = ShardDataset([resolve(path) for path in recipe.data])
    cache = None if recipe.token_cache is None else TokenCache(recipe, model, shards)
    if cache is not None and cache.is_complete():
        return cache.load()
    part, moments = _encode_part(recipe, model, shards, cache, progress, ranks)
    moments.all_reduce(ranks.control)
    parts = ranks.gather(part)
    names = [name for one in parts for name in one.names]
    about = {
        "images": str(moments.count),
        "image_size": str(model.config.vision.image_size),
        "latents": model.config.latent_convention,
    }
    statistics = LatentStatistics(moments.mean, moments.var, about | {"preprocess": PREPROCESS})
    classes = sorted(set(names)) if recipe.condition == "class" else []
    label_of = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([label_of[name] for name in names] if classes else [0] * len(names))
    if cache is not None:
        if ranks.first:
            samples = torch.tensor([number for one in parts for number in one.numbers])
            shape, text_shape = (
                next((s for s in shapes if s), ()) for shapes in zip(*(one.shapes for one in parts), strict=True)
            )
            cache.finish(samples, labels, classes, statistics, shape, text_shape)
        ranks.wait()
        return cache.load()
    latents = torch.cat([chunk for one in parts for chunk in one.latents] + [chunk for one in parts for chunk in one.mirrored])
    condition = labels if classes else torch.cat([chunk for one in parts for chunk in one.texts])
    rows = torch.arange(len(latents))
    return Tokens(latents, condition, torch.stack([rows, rows % len(names)], 1), classes, statistics)


@torch.inference_mode()
def text_tokens(model: OpenVision3, texts: list[str]) -> Tensor:
    """Texts -> text tower tokens [B, L, E], float32 on the CPU."""
    return model.text(model.text_ids(texts), return_tokens=True)[1].float().cpu()


@dataclass
class _Part:
    """What a rank encoded: index and class of each readable sample; the tensors too if they stay in memory."""

    numbers: list[int]
    names: list[str]
    latents: list[Tensor]
    mirrored: list[Tensor]
    texts: list[Tensor]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@torch.inference_mode()
def _encode_part(
    recipe: GenerateRecipe, model: OpenVision3, shards: ShardDataset, cache: TokenCache | None, progress: bool, ranks: Ranks
) -> tuple[_Part, ElementMoments]:
    part, moments = _Part([], [], [], [], [], ((), ())), ElementMoments()
    own = range(len(shards) * ranks.rank // ranks.world, len(shards) * (ranks.rank + 1) // ranks.world)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("encode", total=len(own))
        for numbers, pictures in _chunks(shards, own, model.config.vision.image_size):
            names = pictures.column(recipe.class_field)
            if recipe.condition == "class" and not all(names):
                key = pictures.keys[names.index("")]
                raise DataError(f"generate: sample {key} has no {recipe.class_field!r} in its metadata (class_field)")
            views = (pictures.images, pictures.images.flip(-1)) if recipe.flip else (pictures.images,)
            latents = [as_latents(model.encode(to_model_range(view))[1].float().cpu()) for view in views]
            for view in latents:
                moments.add(view)
            texts = text_tokens(model, pictures.texts()) if recipe.condition == "text" else None
            part.numbers += numbers
            part.names += names
            part.shapes = tuple(latents[0].shape[1:]), () if texts is None else tuple(texts.shape[1:])
            if cache is not None:
                cache.write(numbers, latents, texts)
            else:
                part.latents.append(latents[0])
                part.mirrored += latents[1:]
                part.texts += [] if texts is None else [texts]
            bar.advance(task, len(numbers))
    return part, moments


def _chunks(shards: ShardDataset, numbers: range, size: int) -> Iterator[tuple[list[int], Pictures]]:
    """Indices and images of these samples, CHUNK at a time; unreadable ones are skipped with a warning."""
    skips = SkipCounter(len(numbers), SKIP_BUDGET)
    read = readable(shards, numbers, size, skips)
    while chunk := list(islice(read, CHUNK)):
        yield (
            [number for number, *_ in chunk],
            as_pictures([image for _, image, _ in chunk], [sample for *_, sample in chunk], skips),
        )


class TokenCache:
    """recipe.token_cache; the module docstring gives its layout. ValueError if it holds tokens of other weights or data."""

    def __init__(self, recipe: GenerateRecipe, model: OpenVision3, shards: ShardDataset) -> None:
        assert recipe.token_cache is not None
        self.folder = check_writable_folder(recipe.token_cache, "token_cache")
        self.samples, self.flip, self.text = len(shards), recipe.flip, recipe.condition == "text"
        facts = {
            "shards": [shard.stamp() for shard in shards.shards],
            "model": weights_hash(model),
            "vae": weights_hash(model.get_vae()),  # not among the model's own weights
            "recipe": {"flip": recipe.flip, "condition": recipe.condition, "class_field": recipe.class_field},
            "image_size": model.config.vision.image_size,
            "preprocess": PREPROCESS,
        }
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._open: tuple[Tensor, Tensor | None] | None = None

    def is_complete(self) -> bool:
        if not (self.folder / INDEX).is_file():
            return False
        if self._read()[1]["key"] != self.key:
            raise ValueError(
                f"generate: token_cache {self.folder} holds tokens of another model or other data; delete it, or give another folder"
            )
        return True

    def write(self, numbers: list[int], latents: list[Tensor], texts: Tensor | None) -> None:
        """Write a chunk's latents (with flip, those of the mirror images second) and text tokens."""
        if self._open is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open = self._mapped(latents[0].shape[1:], () if texts is None else texts.shape[1:])
        kept, kept_texts = self._open
        rows = torch.tensor(numbers)
        for view, of_view in enumerate(latents):
            kept[rows + view * self.samples] = of_view.to(kept.dtype)
        if texts is not None and kept_texts is not None:
            kept_texts[rows] = texts.to(kept_texts.dtype)

    def finish(
        self,
        samples: Tensor,
        labels: Tensor,
        classes: list[str],
        statistics: LatentStatistics,
        shape: tuple[int, ...],
        texts: tuple[int, ...],
    ) -> None:
        """Write the index, which marks the folder as complete."""
        from safetensors.torch import save_file

        about = {"key": self.key, "shape": shape, "texts": texts, "classes": classes, "statistics": statistics.about}
        tensors = {"samples": samples, "labels": labels, "mean": statistics.mean, "var": statistics.var}
        with naming_full_disk(self.folder), atomic_write(self.folder / INDEX) as temporary:
            save_file(tensors, temporary, {name: json.dumps(value) for name, value in about.items()})

    def load(self) -> Tokens:
        tensors, about = self._read()
        latents, texts = self._mapped(about["shape"], about["texts"])
        samples, labels = tensors["samples"], tensors["labels"]
        owner = samples if self.text else torch.arange(len(samples))
        views = [torch.stack([samples + view * self.samples, owner], 1) for view in range(1 + self.flip)]
        statistics = LatentStatistics(tensors["mean"], tensors["var"], about["statistics"])
        return Tokens(latents, labels if texts is None else texts, torch.cat(views), about["classes"], statistics)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import safe_open

        with safe_open(self.folder / INDEX, "pt") as file:
            about = {name: json.loads(value) for name, value in file.metadata().items()}
            return {name: file.get_tensor(name) for name in file.keys()}, about

    def _mapped(self, shape: Any, text_shape: Any) -> tuple[Tensor, Tensor | None]:
        latents = _mapped(self.folder / LATENTS, (self.samples * (1 + self.flip), *shape))
        return latents, _mapped(self.folder / TEXTS, (self.samples, *text_shape)) if self.text else None


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A memory-mapped bfloat16 file, created if missing; pages are read and written on access."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.bfloat16).view(shape)
