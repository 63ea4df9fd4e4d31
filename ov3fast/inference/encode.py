"""Images -> pooled features and tokens."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ov3fast.data.images import ImageError
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.skips import DataError, Skip, SkipCounter
from ov3fast.inference.batches import batch_invariant
from ov3fast.inference.decoding import Options, Picture, as_batch, decoded
from ov3fast.inference.embeddings import Embeddings, MappedFile, check_output, write_embeddings
from ov3fast.inference.images import find_images
from ov3fast.inference.load import VisionTower
from ov3fast.io import naming_full_disk
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3

if TYPE_CHECKING:
    from ov3fast.data.preprocess import ImageLike


class Written(NamedTuple):
    """The result of encode_to_file: the file, the names of its images, and name -> reason for those that could not be read."""

    path: Path
    names: list[str]
    skipped: dict[str, str]


def encode(
    model: OpenVision3 | VisionTower,
    images: ImageLike | Sequence[ImageLike],
    *,
    image_size: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    interpolation: str = "bicubic",
    tokens: bool = True,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    progress: bool = False,
    batch_invariant: bool = True,
) -> Embeddings:
    """Encodes images, batch by batch; `workers` threads decode ahead, unless that is quick beside the model and done between batches.

    model: from load_model, in eval mode. images: files and folders, or anything else that `ov3fast.preprocess` takes (Pillow images,
    arrays, tensors), named by their position in the list. image_size: pixels, default the model's; images are resized to it
    and centre-cropped. tokens: False keeps only the pooled features. batch_invariant: on a CPU an image's values have the same bits
    for any batch_size (see inference.batches); False chooses operators by speed alone. Images that can't be read cause a warning and
    are listed in `skipped`. FileNotFoundError or ValueError for wrong paths or a wrong size, DataError if no image is left.
    """
    options = Options(image_size, batch_size, workers, interpolation, tokens, max_image_pixels, progress, batch_invariant)
    job = Job(model, images, options, Memory(), Memory() if tokens else None)
    job.run()
    return job.embeddings()


def encode_to_file(
    model: OpenVision3 | VisionTower, images: ImageLike | Sequence[ImageLike], out: str | Path, **options: Any
) -> Written:
    """Encodes images into an embeddings file, in memory that doesn't grow with their number; options as for `encode`.

    out: .safetensors, .npz or .npy, checked before the work. A job that ends early (Ctrl-C, an error) leaves its finished images
    in `<name>.partial<suffix>` beside it, warns of that, and leaves `out` unchanged.
    """
    out = check_output(out)
    chosen = Options(**{"tokens": out.suffix != ".npy", **options})
    job = Job(model, images, chosen, Memory(), None)
    with contextlib.ExitStack() as files:
        files.enter_context(naming_full_disk(out))
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = files.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.stem}.writing-", dir=out.parent))
        job.pooled = files.enter_context(MappedFile(Path(folder, "pooled")))
        if chosen.tokens:
            job.tokens = files.enter_context(MappedFile(Path(folder, "tokens")))
        try:
            job.run()
            write_embeddings(out, job.embeddings())
        except BaseException:  # also on Ctrl-C: hours of work must not be lost
            _keep_partial(job, out)
            raise
    return Written(out, job.names, job.skipped)


def _keep_partial(job: Job, out: Path) -> None:
    if not job.names:
        return
    partial = out.with_name(f"{out.stem}.partial{out.suffix}")
    with contextlib.suppress(OSError):  # a full disk may have ended the job
        write_embeddings(partial, job.embeddings())
        warnings.warn(f"stopped after {len(job.names)} of {len(job.sources)} images; they are in {partial}", stacklevel=3)


class _Rows(Protocol):
    def append(self, rows: Tensor) -> None: ...
    def tensor(self, count: int) -> Tensor: ...


class Memory:
    """Rows [n, ...] kept in memory."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        self.parts.append(rows)

    def tensor(self, count: int) -> Tensor:
        return torch.cat(self.parts)[:count]


@dataclass
class Job:
    """One run over images; `names`, `pooled` and `tokens` hold what was encoded so far."""

    model: OpenVision3 | VisionTower
    images: Any
    options: Options
    pooled: _Rows
    tokens: _Rows | None
    names: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    on_batch: Callable[[int], None] = lambda count: None
    """Called with the size of each encoded batch."""

    def __post_init__(self) -> None:
        self.size = image_side(self.model, self.options, "encode")
        self.sources = self.images if isinstance(self.images, dict) else find_sources(self.images)

    @torch.inference_mode()
    def run(self) -> None:
        skips = SkipCounter(len(self.sources), budget=1.0)
        names: list[str] = []
        batch: list[Picture] = []
        for number, (name, found) in enumerate(decoded(self.sources, self.size, self.options)):
            if isinstance(found, ImageError):
                self.skipped[name] = found.reason
                skips.add(Skip(number, name, found.reason, str(found)))
                continue
            names.append(name)
            batch.append(found)
            if len(batch) == self.options.batch_size:
                self._encode(names, batch)
                names, batch = [], []
        if batch:
            self._encode(names, batch)
        if not self.names:
            raise DataError(f"encode: none of the {len(self.sources)} images could be read ({skips})")

    def embeddings(self) -> Embeddings:
        count = len(self.names)
        tokens = None if self.tokens is None else self.tokens.tensor(count)
        return Embeddings(
            self.pooled.tensor(count),
            tokens,
            self.names,
            self.skipped,
            about(self.model, self.size, self.options.interpolation),
        )

    def _encode(self, names: list[str], batch: list[Picture]) -> None:
        with batch_invariant(self.model) if self.options.batch_invariant else contextlib.nullcontext():
            pooled, tokens = self.model.encode(as_batch(batch))
        self.pooled.append(pooled.float().cpu())
        if self.tokens is not None:
            self.tokens.append(tokens.float().cpu())
        self.names += names
        self.on_batch(len(names))


def about(model: OpenVision3 | VisionTower, size: int, interpolation: str = "bicubic") -> dict[str, str]:
    """How the embeddings were made: `Embeddings.about`."""
    return {
        "latents": model.encoder.latent_convention,
        "image_size": str(size),
        "preprocess": f"white background, shorter side resized ({interpolation}, antialias), centre crop, [-1, 1]",
    }


def image_side(model: OpenVision3 | VisionTower, options: Options, what: str) -> int:
    """The side in pixels that images are resized to. ValueError for invalid options."""
    vision = model.encoder.config
    size, stride = options.image_size, VAE_STRIDE * vision.patch_size
    size = vision.image_size if size is None else size
    for name, value in (("batch_size", options.batch_size), ("workers", options.workers), ("image_size", size)):
        if value < 1:
            raise ValueError(f"{what}: {name} must be at least 1, got {value}")
    if size % stride:
        raise ValueError(f"{what}: image_size must be a multiple of {stride} pixels, got {size}")
    return size


def find_sources(images: ImageLike | Sequence[ImageLike]) -> dict[str, Any]:
    """Name -> an argument for preprocess: files found in paths and folders, or images in memory named 0, 1, ..."""
    given: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    if all(isinstance(image, str | Path) for image in given):
        files = find_images(given)
        files.warn_of_left_out()
        return files
    found: dict[str, Any] = {}
    for number, image in enumerate(given):
        if isinstance(image, str | Path):
            found |= find_images(image)
        elif isinstance(image, Tensor | np.ndarray) and image.ndim == 4:
            found |= {f"{number}/{row}" if len(given) > 1 else str(row): one for row, one in enumerate(image)}
        else:
            found[str(number)] = image
    return found
