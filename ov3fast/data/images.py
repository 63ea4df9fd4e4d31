"""Image bytes to Pillow images, with a named reason for every image that can't be used."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from ov3fast.data.limits import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from PIL import Image


class ImageError(ValueError):
    """An image that can't be decoded; `reason` is "broken_image", "truncated_image" or "too_large"."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def decode_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode to a loaded Pillow image, RGBA if it has transparency, else RGB. The size is checked before decoding."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_image_pixels:
            raise ImageError("too_large", f"{image.width}x{image.height} pixels, the limit is {max_image_pixels}")
        image.load()
        transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
        return image.convert("RGBA" if transparent else "RGB")
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's codecs raise OSError, SyntaxError, struct.error, EOFError and others on bad bytes
        reason = "truncated_image" if "truncated" in str(error).lower() else "broken_image"
        raise ImageError(reason, f"{type(error).__name__}: {error}") from None
