"""Image bytes -> one upright 8-bit image, with a named reason for every image that can't be used.

Files (`ov3fast encode`) and shards (training, evaluation) are decoded alike:

- The EXIF orientation is applied. Metadata that can't be parsed is ignored; only the pixels count.
- Palette, grey, CMYK and YCbCr images become RGB; with an alpha channel or a transparent colour the result is RGBA.
- 16-bit samples keep their high byte (>> 8). 32-bit floats must be in the range 0 to 1; others, and 32-bit
  integers, whose range no file states, are rejected as "unsupported_depth".
- An animation or a file with several pages is decoded to its first frame.
- The size is checked before anything is decoded.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ov3fast.data import jpeg
from ov3fast.data.image_metadata import frames, orientation, without_metadata
from ov3fast.data.jpeg import Reduced
from ov3fast.data.limits import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from PIL import Image

DECODE_VERSION = 2
"""Incremented when the same bytes decode to different pixels; caches of decoded images include it in their keys."""

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".jfif", ".jpe", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".jp2",
)  # fmt: skip
"""Suffixes of image files, in lower case; in a sample with several, the first in this order is its image."""

# Pillow's plugins for them. No others are tried, whatever the bytes are: the EPS plugin, for example, runs Ghostscript.
_PLUGINS = ("Jpeg", "Png", "WebP", "Avif", "Gif", "Bmp", "Tiff", "Mpo", "Ppm", "Jpeg2K")
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "JPEG2000")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


class ImageError(ValueError):
    """An image that can't be used. `reason` is one of broken_image, truncated_image, too_large, too_many_frames, unsupported_depth,
    unsupported_format."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def decode_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS, max_frames: int | None = None) -> Image.Image:
    """An upright Pillow image of mode RGB, or RGBA if there is transparency; its `info` is empty.

    max_frames: the largest number of frames or pages; None: they aren't counted. Raises ImageError, and nothing else, whatever the
    bytes are.
    """
    if max_frames is not None and (found := frames(data, max_frames)) > max_frames:
        raise ImageError("too_many_frames", f"at least {found} frames, the limit is {max_frames}")
    return _decoded(data, max_image_pixels, None)


def decode_reduced(
    data: bytes, shrink: Callable[[int, int], int], max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image | Reduced:
    """A JPEG at 1 / shrink(width, height) of its size (1, 2, 4 or 8), which is much less work. Other files, and JPEGs that have to be
    rotated, as by decode_image."""
    return _decoded(data, max_image_pixels, shrink)


def _decoded(data: bytes, max_image_pixels: int, shrink: Callable[[int, int], int] | None) -> Any:
    try:
        return _decode(data, max_image_pixels, shrink)
    except ImageError as error:
        stripped = without_metadata(data) if error.reason == "broken_image" else data
        if stripped == data:
            raise
        try:
            return _decode(stripped, max_image_pixels, shrink)
        except ImageError:
            raise error from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """A loaded Pillow image of any mode -> the result of decode_image for its file. ImageError for an unsupported depth."""
    method = orientation(image)
    return _turned(_eight_bit(image), method)


def _turned(decoded: Image.Image, method: Image.Transpose | None) -> Image.Image:
    if method is not None:
        decoded = decoded.transpose(method)
    decoded.info.clear()  # an orientation left there would be applied a second time
    return decoded


def _decode(data: bytes, max_image_pixels: int, shrink: Callable[[int, int], int] | None) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Pillow's warnings name no file. Only Pillow's: filters set in threads may outlive their block.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            image = Image.open(io.BytesIO(data), formats=_formats())
            if image.width * image.height > max_image_pixels:
                raise ImageError("too_large", f"{image.width}x{image.height} pixels, the limit is {max_image_pixels}")
            if shrink is not None and image.format == "JPEG" and orientation(image) is None:
                return _reduced(data, image, shrink)
            fast = jpeg.pixels(data) if image.format == "JPEG" and image.mode == "RGB" else None
            if fast is not None:
                return _turned(Image.fromarray(fast), orientation(image))
            image.load()
            if not image.width or not image.height:
                raise ImageError("broken_image", f"it has no pixels ({image.width}x{image.height})")
            return upright_rgb(image)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's codecs raise OSError, SyntaxError, struct.error, EOFError and others on bad bytes
        raise _named(error, data) from None


def _reduced(data: bytes, image: Image.Image, shrink: Callable[[int, int], int]) -> Reduced:
    full = image.size
    reduction = shrink(*full)
    least = (0, 0) if reduction == 1 else (-(-full[0] // reduction), -(-full[1] // reduction))
    pixels = jpeg.pixels(data, least) if image.mode == "RGB" else None
    if pixels is None:
        jpeg.draft(image, reduction)
        image.load()
        pixels = np.array(upright_rgb(image))
    return Reduced(pixels, full, reduction)


@lru_cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that this Pillow reads."""
    from PIL import Image

    for name in _PLUGINS:
        try:
            importlib.import_module(f"PIL.{name}ImagePlugin")
        except ImportError:
            continue  # AVIF came with Pillow 11.3
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _named(error: Exception, data: bytes) -> ImageError:
    text = str(error)
    if "truncated" in text.lower() and "chunk" not in text:
        return ImageError("truncated_image", f"{type(error).__name__}: {text}")
    if "Decompressed data too large" in text:
        return ImageError("too_large", f"its metadata decompresses to too much data: {text}")
    if type(error).__name__ == "UnidentifiedImageError":
        if data[4:8] == b"ftyp" or data[:4] in (b"8BPS", b"%!PS"):
            brand = data[8:12] if data[4:8] == b"ftyp" else data[:4]
            return ImageError("unsupported_format", f"this Pillow can't read images of type {brand.decode('latin-1')!r}")
        text = "not an image that Pillow can identify"  # Pillow's message has the address of a BytesIO
    return ImageError("broken_image", f"{type(error).__name__}: {text}")


def _eight_bit(image: Image.Image) -> Image.Image:
    """The pixels as RGB or RGBA."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # "I" by older Pillows
        samples = np.asarray(image).astype(np.int32)
        clear = image.info.get("transparency")
        grey = Image.fromarray((_black_is_zero(image, samples, 65535) >> _depth_over_8(image)).clip(0, 255).astype(np.uint8))
        if not isinstance(clear, int):
            return grey.convert("RGB")
        grey.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
        return grey.convert("RGBA")
    if image.mode == "F":
        samples = np.asarray(image)
        if not (samples >= 0).all() or not (samples <= 1).all():
            raise ImageError(
                "unsupported_depth", f"float samples from {samples.min():g} to {samples.max():g}; they must be 0 to 1"
            )
        scaled = _black_is_zero(image, samples.astype(np.float64), 1.0) * 255
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise ImageError("unsupported_depth", "32-bit integer samples, whose range the file does not state")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        try:
            return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        except (ValueError, OverflowError, TypeError):
            if image.mode in _ALPHA_MODES:
                raise
            image.info.pop("transparency")  # a transparent colour that the mode can't hold
    return image.convert("RGB")


def _black_is_zero(image: Image.Image, samples: np.ndarray, white: float) -> np.ndarray:
    """Undoes TIFF's WhiteIsZero, as Pillow does for up to 8 bits."""
    tags = getattr(image, "tag_v2", {})
    return white - samples if tags.get(262) == 0 else samples


def _depth_over_8(image: Image.Image) -> int:
    """How many bits beyond 8 the samples have: TIFF's 12-bit samples are not scaled to 16."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    return 4 if tuple(np.atleast_1d(bits)) == (12,) else 8
