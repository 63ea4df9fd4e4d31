"""Images -> captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ov3fast.data.images import ImageError
from ov3fast.inference.batches import batch_invariant
from ov3fast.inference.decoding import Options, Picture, as_batch, decoded
from ov3fast.inference.encode import find_sources, image_side
from ov3fast.inference.load import VisionTower
from ov3fast.models.openvision3 import OpenVision3

if TYPE_CHECKING:
    from ov3fast.data.preprocess import ImageLike


class Captioned(NamedTuple):
    """An image's name and caption; caption is None if it can't be read, and `reason` says why."""

    name: str
    caption: str | None
    reason: str = ""


def caption(
    model: OpenVision3,
    images: ImageLike | Sequence[ImageLike],
    *,
    beams: int = 1,
    image_size: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
) -> Iterator[Captioned]:
    """Captions images, in order, batch by batch; images and image_size as for `encode`.

    beams: 1 is greedy. ValueError for wrong options or a released vision tower, which has no captioner; errors for paths as in `encode`.
    Both are raised before the first image.
    """
    if isinstance(model, VisionTower):
        raise ValueError("caption: a released vision tower has no caption decoder; give an OpenVision3")
    if beams < 1:
        raise ValueError(f"caption: beams must be at least 1, got {beams}")
    options = Options(image_size=image_size, batch_size=batch_size, workers=workers)
    size = image_side(model, options, "caption")
    return _caption_each(model, find_sources(images), size, options, beams)


def _caption_each(model: OpenVision3, sources: dict[str, Any], size: int, options: Options, beams: int) -> Iterator[Captioned]:
    waiting: list[tuple[str, Picture | ImageError]] = []
    for name, found in decoded(sources, size, options):
        waiting.append((name, found))
        if len(waiting) == options.batch_size:
            yield from _captions(model, waiting, beams)
            waiting = []
    if waiting:
        yield from _captions(model, waiting, beams)


def _captions(model: OpenVision3, batch: list[tuple[str, Picture | ImageError]], beams: int) -> list[Captioned]:
    pictures = [found for _, found in batch if not isinstance(found, ImageError)]
    with batch_invariant(model):
        texts = iter(model.caption(as_batch(pictures), beams=beams) if pictures else [])
    return [
        Captioned(name, None, f"{found.reason}: {found}") if isinstance(found, ImageError) else Captioned(name, next(texts))
        for name, found in batch
    ]
