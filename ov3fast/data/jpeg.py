"""Decodes JPEGs with simplejpeg if it is installed: Pillow's pixels in about two thirds of its time, at full size or at 1/2, 1/4 or 1/8 of it.

Both wrap libjpeg-turbo, whose builds may round differently, so simplejpeg is used only if it reproduces Pillow's bits on a probe; files
that it complains about are left to Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

REDUCTIONS = (1, 2, 4, 8)
"""Factors by which a JPEG can be decoded smaller: its 8 x 8 blocks become 4 x 4, 2 x 2 or single pixels, each roughly a mean."""


@dataclass
class Reduced:
    """A JPEG decoded at 1 / reduction of its size, with what the loader uses of a Pillow image."""

    pixels: np.ndarray
    """uint8 [H, W, 3]; the sides are rounded up."""
    full_size: tuple[int, int]
    """(width, height) of the file."""
    reduction: int
    variant: int | None = None
    """The sample's variant, for whose crop it was decoded."""
    mode = "RGB"

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]


def pixels(data: bytes, size: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """uint8 [H, W, 3] of a JPEG with three channels; None if simplejpeg is missing or rejects the file.

    size: the smallest acceptable (width, height); (0, 0): the file's own.
    """
    decode = decoder()
    if decode is None:
        return None
    try:
        return decode(data, size)
    except Exception:  # Pillow will name what is wrong
        return None


def draft(image: Image.Image, reduction: int) -> None:
    """Has Pillow decode an opened JPEG at 1 / reduction of its size."""
    if reduction > 1:
        image.draft(image.mode, (max(1, image.width // reduction), max(1, image.height // reduction)))


@lru_cache
def decoder() -> Callable[[bytes, tuple[int, int]], np.ndarray] | None:
    """simplejpeg's decoder, if it is installed and agrees with Pillow on this machine."""
    try:
        import simplejpeg
    except ImportError:
        return None
    from PIL import Image

    def decode(data: bytes, size: tuple[int, int]) -> np.ndarray:
        return simplejpeg.decode_jpeg(
            data,
            "RGB",
            fastdct=False,
            fastupsample=False,
            min_width=size[0],
            min_height=size[1],
            min_factor=2 if any(size) else 1,
        )

    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    probe = Image.fromarray(noise).resize((117, 75), Image.Resampling.BICUBIC)
    for subsampling in (0, 2):
        file = io.BytesIO()
        probe.save(file, "JPEG", quality=85, subsampling=subsampling)
        for reduction in REDUCTIONS:
            image, size = Image.open(file), (0, 0) if reduction == 1 else (-(-117 // reduction), -(-75 // reduction))
            draft(image, reduction)
            if not np.array_equal(decode(file.getvalue(), size), np.asarray(image.convert("RGB"))):
                return None
    return decode
