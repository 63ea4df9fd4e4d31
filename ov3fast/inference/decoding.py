"""Image sources -> decoded squares in order, read between batches or by threads, and batches of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ov3fast.data.images import ImageError
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.preprocess import preprocess, read_image, square_pixels
from ov3fast.data.transforms import to_tensor
from ov3fast.terminal import is_terminal

Picture: TypeAlias = np.ndarray | Tensor
"""A square image: uint8 [S, S, 3 or 4], RGB or RGBa, or float32 [3, S, S] in [-1, 1]."""
AT_ONCE = 8
"""Images per task of a thread: handing one over costs as much as resizing a small one."""
QUICK = 0.1
"""The largest share of a batch's time that its decoding may take between batches."""


@dataclass(frozen=True)
class Options:
    """How images are prepared and encoded; see `encode`."""

    image_size: int | None = None
    batch_size: int = 32
    workers: int = 2
    interpolation: str = "bicubic"
    tokens: bool = True
    max_image_pixels: int = MAX_IMAGE_PIXELS
    progress: bool = False
    batch_invariant: bool = True


def as_batch(pictures: Sequence[Picture]) -> Tensor:
    """float32 [B, 3, S, S] in [-1, 1], on white."""
    if all(isinstance(one, np.ndarray) and one.shape[2] == 3 for one in pictures):
        return to_tensor(np.stack(pictures))
    return torch.stack([one if isinstance(one, Tensor) else to_tensor(one[None])[0] for one in pictures])


def decoded(sources: Mapping[str, Any], size: int, options: Options) -> Iterator[tuple[str, Picture | ImageError]]:
    """(name, image or what is wrong with it) in order.

    As long as decoding a batch takes less than QUICK of the time until the next one is wanted, it is done in between: beside a model that uses all
    cores, decoding threads would cost more, as its threads wait for each other. From then on threads decode, two batches in flight at a time.
    """
    items: Iterable[tuple[str, Any]] = sources.items()
    if options.progress and is_terminal():
        from rich.progress import track

        items = track(items, "encode", len(sources), transient=True)
    left = iter(items)
    while part := list(islice(left, options.batch_size)):
        began = time.perf_counter()
        names, given = map(list, zip(*part, strict=True))
        found = _read_all(given, size, options)
        done = time.perf_counter()
        yield from zip(names, found, strict=True)
        if done - began >= QUICK * (time.perf_counter() - done):
            yield from _ahead(left, size, options)


def _ahead(left: Iterator[tuple[str, Any]], size: int, options: Options) -> Iterator[tuple[str, Picture | ImageError]]:
    waiting: deque[tuple[list[str], Future[list[Picture | ImageError]]]] = deque()
    images = 0
    pool = ThreadPoolExecutor(options.workers)
    try:
        while part := list(islice(left, min(AT_ONCE, -(-options.batch_size // options.workers)))):
            names, given = map(list, zip(*part, strict=True))
            waiting.append((names, pool.submit(_read_all, given, size, options)))
            images += len(names)
            if images > 2 * options.batch_size:
                names, found = waiting.popleft()
                images -= len(names)
                yield from zip(names, found.result(), strict=True)
        for names, found in waiting:
            yield from zip(names, found.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def readable_batches(images: Mapping[str, Any], size: int, options: Options, skipped: list[str]) -> Iterator[Tensor]:
    """Batches float32 [B, 3, size, size] of the readable images, in order; the others are recorded in `skipped`."""
    batch: list[Picture] = []
    for name, picture in decoded(images, size, options):
        if isinstance(picture, ImageError):
            skipped.append(name)
            continue
        batch.append(picture)
        if len(batch) == options.batch_size:
            yield as_batch(batch)
            batch = []
    if batch:
        yield as_batch(batch)


def _read_all(sources: Sequence[Any], size: int, options: Options) -> list[Picture | ImageError]:
    return [_read(source, size, options) for source in sources]


def _read(source: Any, size: int, options: Options) -> Picture | ImageError:
    if not isinstance(source, Path) and not callable(source):
        picture = preprocess(source, size, interpolation=options.interpolation)[0]
        if picture.shape[1:] != (size, size):
            raise ValueError(f"encode: float images are not resized; got {tuple(picture.shape)} for image_size {size}")
        return picture
    try:
        image = source() if callable(source) else read_image(source, options.max_image_pixels)
        return square_pixels(image, size, options.interpolation)
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError("unreadable_file", str(error))
    except Exception as error:  # one bad file must not stop the others
        return ImageError("broken_image", f"{type(error).__name__}: {error}")
