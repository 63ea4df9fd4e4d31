"""Held-out pictures in memory: read from shards, made square, with their captions; and their embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast.data.captions import texts_under
from ov3fast.data.shards import Sample, ShardDataset
from ov3fast.data.skips import DataError, SampleError, SkipCounter, printable
from ov3fast.data.transforms import center_boxes, crop_resize, premultiplied, to_tensor
from ov3fast.evaluation.reconstruction import to_model_range

NAME_KEYS = ("name", "caption", "txt")
CAPTION_KEYS = ("caption", "txt", "name")


@dataclass(frozen=True)
class Pictures:
    """images uint8 [N, 3, S, S], with each one's key, captions and metadata. skipped: reason -> number of samples that could not be read."""

    images: Tensor
    keys: list[str]
    captions: list[dict[str, str]]
    meta: list[dict[str, Any]]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.keys)

    def texts(self, key: str | None = None) -> list[str]:
        """The text of each picture for retrieval, "" if there is none: the one under `key`, or else the first of name, caption, txt, any."""
        return self._first(key, NAME_KEYS)

    def own_captions(self, key: str | None = None) -> list[str]:
        """The caption of each picture, for comparison with a generated one: the one under `key`, or else the first of caption, txt, name, any."""
        return self._first(key, CAPTION_KEYS)

    def _first(self, key: str | None, keys: Sequence[str]) -> list[str]:
        if key is not None:
            return [captions.get(key, "") for captions in self.captions]
        found = []
        for captions, meta in zip(self.captions, self.meta, strict=True):
            # A field that is not under "captions" (such as a license) is a caption only if its name says so.
            others = (k for k in captions if k not in meta or "caption" in k or "text" in k)
            found.append(next((captions[k] for k in (*keys, *others) if captions.get(k)), ""))
        return found

    def column(self, name: str, default: str = "") -> list[str]:
        """One metadata field per picture."""
        return [printable(str(meta.get(name, default))) for meta in self.meta]

    def rows(self, index: Sequence[int]) -> Pictures:
        chosen = list(index)
        images = self.images[torch.tensor(chosen, dtype=torch.int64)]
        keys, captions, meta = ([of[i] for i in chosen] for of in (self.keys, self.captions, self.meta))
        return Pictures(images, keys, captions, meta, self.skipped)


def read_pictures(
    shards: str | Path | Sequence[str | Path],
    size: int,
    *,
    interpolation: str = "bicubic",
    limit: int | None = None,
    skip_budget: float = 0.1,
    progress: bool = False,
) -> Pictures:
    """Pictures of tar shards on white, their shorter side resized to `size` and the centre cropped.

    limit: at most this many, evenly spaced over the set. Samples that can't be read are skipped, counted and warned of; DataError if they
    exceed skip_budget (a fraction), or if there is nothing to read.
    """
    from rich.progress import track

    dataset = ShardDataset(shards)
    chosen = spread(len(dataset), limit)
    skips = SkipCounter(len(chosen), skip_budget)
    if dataset.uncounted:
        skips.note("truncated_tar", dataset.uncounted)
    numbers = track(chosen, "read pictures", disable=not progress, transient=True)
    read = list(readable(dataset, numbers, size, skips, interpolation))
    if not read:
        raise DataError(f"shards: no picture of {shards} could be read ({skips})")
    return as_pictures([image for _, image, _ in read], [sample for *_, sample in read], skips)


def readable(
    dataset: ShardDataset, numbers: Iterable[int], size: int, skips: SkipCounter, interpolation: str = "bicubic"
) -> Iterator[tuple[int, Tensor, Sample]]:
    """Of these samples the number, the picture uint8 [3, size, size] and the sample; `skips` counts those that can't be read."""
    for number in numbers:
        try:
            sample = dataset[number]
        except SampleError as error:
            skips.add(error.skip)
            continue
        yield number, evaluation_view(sample.image, size, interpolation), sample


def as_pictures(images: Sequence[Tensor], samples: Sequence[Sample], skips: SkipCounter) -> Pictures:
    return Pictures(
        torch.stack(list(images)),
        [printable(sample.key) for sample in samples],
        [{key: texts_under(sample.captions, key)[0] for key in sample.captions} for sample in samples],
        [sample.meta for sample in samples],
        dict(skips.counts),
    )


def evaluation_view(image: Any, size: int, interpolation: str = "bicubic") -> Tensor:
    """A Pillow image -> uint8 [3, size, size]: on white, the shorter side resized to `size`, the centre cropped."""
    cropped = crop_resize(premultiplied(image), center_boxes([image.size])[0], size, interpolation)
    return ((to_tensor(cropped[None])[0] + 1) * 127.5).round().to(torch.uint8)


def spread(count: int, limit: int | None) -> list[int]:
    """`limit` numbers evenly spaced over 0..count-1; all of them if limit is None or at least count."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


@torch.inference_mode()
def embed_images(model: Any, images: Tensor, batch_size: int = 64, progress: bool = False, label: str = "embed") -> Tensor:
    """uint8 [N, 3, H, W] -> the model's pooled features, float32 [N, E] on the CPU, not normalised."""
    from rich.progress import track

    parts = []
    for start in track(range(0, len(images), batch_size), label, disable=not progress, transient=True):
        parts.append(model.encode_image(to_model_range(images[start : start + batch_size])).float().cpu())
    return torch.cat(parts)


@torch.inference_mode()
def embed_texts(model: Any, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Texts -> the text encoder's features, float32 [N, E] on the CPU, not normalised."""
    parts = [model.encode_text(texts[i : i + batch_size]).float().cpu() for i in range(0, len(texts), batch_size)]
    return torch.cat(parts)
