"""JPEGs through simplejpeg where it is installed: Pillow's pixels in about two thirds of its time.

Both wrap libjpeg-turbo, whose builds may round differently, so it is taken only where it gives Pillow's bits on a probe; and what it
doesn't read without a complaint is left to Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np


def pixels(data: bytes) -> np.ndarray | None:
    """uint8 [H, W, 3] of a JPEG with three channels; None where simplejpeg is missing or has anything against the file."""
    decode = decoder()
    if decode is None:
        return None
    try:
        return decode(data)
    except Exception:  # Pillow will name what is wrong
        return None


@lru_cache
def decoder() -> Callable[[bytes], np.ndarray] | None:
    """simplejpeg's decoder, if it is installed and agrees with Pillow here."""
    try:
        import simplejpeg
    except ImportError:
        return None
    from PIL import Image

    def decode(data: bytes) -> np.ndarray:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)

    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    probe = Image.fromarray(noise).resize((117, 75), Image.Resampling.BICUBIC)
    for subsampling in (0, 2):
        file = io.BytesIO()
        probe.save(file, "JPEG", quality=85, subsampling=subsampling)
        if not np.array_equal(decode(file.getvalue()), np.asarray(Image.open(file).convert("RGB"))):
            return None
    return decode
