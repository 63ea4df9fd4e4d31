"""Image files -> pooled features and tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ov3fast.data.images import ImageError
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.skips import DataError, Skip, SkipCounter
from ov3fast.inference.embeddings import Embeddings
from ov3fast.inference.images import find_images, read_image, square
from ov3fast.inference.load import VisionTower
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3


@torch.inference_mode()
def encode(
    model: OpenVision3 | VisionTower,
    images: str | Path | Sequence[str | Path],
    *,
    image_size: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    interpolation: str = "bicubic",
    tokens: bool = True,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    progress: bool = False,
) -> Embeddings:
    """Encodes image files and folders, batch by batch, while `workers` threads decode ahead.

    model: from load_model, in eval mode. image_size: pixels, default the model's; pictures are resized to it and centre-cropped. tokens:
    False keeps the pooled features alone, which for a large folder is what fits into memory. Images that can't be read are warned of,
    and named in `skipped`. FileNotFoundError or ValueError for wrong paths or a wrong size, DataError if no image is left.
    """
    vision = model.encoder.config
    size, stride = image_size or vision.image_size, VAE_STRIDE * vision.patch_size
    for name, value in (("batch_size", batch_size), ("workers", workers), ("image_size", size)):
        if value < 1:
            raise ValueError(f"encode: {name} must be at least 1, got {value}")
    if size % stride:
        raise ValueError(f"encode: image_size must be a multiple of {stride} pixels, got {size}")
    files = find_images(images)
    skips = SkipCounter(len(files), budget=1.0)
    skipped: dict[str, str] = {}
    names: list[str] = []
    pooled: list[Tensor] = []
    kept: list[Tensor] = []
    dtype = model.encoder.cls_token.dtype

    def run(batch: list[Tensor]) -> None:
        latents = model.latents(torch.stack(batch).to(model.device))
        features, patches = model.encode(latents.to(dtype))
        pooled.append(features.float().cpu())
        if tokens:
            kept.append(patches.float().cpu())

    batch: list[Tensor] = []
    for number, (name, found) in enumerate(
        _decoded(files, size, interpolation, max_image_pixels, batch_size, workers, progress)
    ):
        if isinstance(found, ImageError):
            skipped[name] = found.reason
            skips.add(Skip(number, name, found.reason, str(found)))
            continue
        names.append(name)
        batch.append(found)
        if len(batch) == batch_size:
            run(batch)
            batch = []
    if batch:
        run(batch)
    if not names:
        raise DataError(f"encode: none of the {len(files)} images could be read ({skips})")
    about = {
        "latents": model.encoder.latents,
        "image_size": str(size),
        "preprocess": f"white background, shorter side resized ({interpolation}, antialias), centre crop, [-1, 1]",
    }
    return Embeddings(torch.cat(pooled), torch.cat(kept) if tokens else None, names, skipped, about)


def _decoded(
    files: dict[str, Path], size: int, interpolation: str, max_pixels: int, batch_size: int, workers: int, progress: bool
) -> Iterator[tuple[str, Tensor | ImageError]]:
    """(name, picture or what is wrong with it) in order; two batches are in work at a time."""
    from rich.console import Console
    from rich.progress import track

    # Where the output is no terminal, rich leaves a blank line for its bar.
    progress = progress and Console().is_terminal

    def read(path: Path) -> Tensor | ImageError:
        try:
            return square(read_image(path, max_pixels), size, interpolation)
        except ImageError as error:
            return error
        except OSError as error:
            return ImageError("unreadable_file", str(error))

    waiting: deque[tuple[str, Future]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for name, path in track(files.items(), "encode", len(files), disable=not progress, transient=True):
            waiting.append((name, pool.submit(read, path)))
            if len(waiting) > 2 * batch_size:
                first, future = waiting.popleft()
                yield first, future.result()
        for name, future in waiting:
            yield name, future.result()
