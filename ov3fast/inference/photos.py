"""Default photos for int8 calibration and for the certificates of exports."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ov3fast.data.preprocess import preprocess
from ov3fast.inference.images import find_images

PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""The colour photos in scikit-image's wheel."""


def package_photos(what: str) -> list[Path]:
    """scikit-image's photos. ValueError if it isn't installed; `what` is the argument for other images."""
    found = importlib.util.find_spec("skimage")
    folder = Path(found.origin or "").parent / "data" if found else None
    photos = [folder / name for name in PHOTOS if (folder / name).is_file()] if folder else []
    if not photos:
        raise ValueError(
            f"{what}: pass images; the default is scikit-image's photos, and scikit-image is not installed "
            "(pip install 'ov3fast[export]')"
        )
    return photos


def photo_batch(
    images: Sequence[str | Path] | str | Path | None, size: int, count: int, what: str = "images"
) -> tuple[Tensor, list[str]]:
    """(float32 [count, 3, size, size] in [-1, 1], the files' names) from files or folders, or from `package_photos`; too few are repeated."""
    if images is None:
        paths = package_photos(what)
    else:
        paths = list(find_images(images).values())
    paths = paths[:count]
    batch = torch.cat([preprocess(path, size) for path in paths])
    return batch.repeat(-(-count // len(batch)), 1, 1, 1)[:count], [path.name for path in paths]
