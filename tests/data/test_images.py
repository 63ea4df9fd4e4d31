import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ov3fast.data.images import ImageError, decode_image


@pytest.mark.parametrize(
    "mode, kind, expected",
    [
        ("RGB", "PNG", "RGB"), ("RGB", "JPEG", "RGB"), ("RGB", "WEBP", "RGB"), ("L", "PNG", "RGB"), ("CMYK", "JPEG", "RGB"),
        ("P", "PNG", "RGB"), ("RGBA", "PNG", "RGBA"), ("LA", "PNG", "RGBA"), ("RGBA", "WEBP", "RGBA"), ("1", "PNG", "RGB"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb_or_rgba(png, mode, kind, expected):
    assert decode_image(png(Image.new(mode, (9, 7)), kind)).mode == expected


def test_palette_transparency_is_kept(png):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    image.putpixel((1, 1), 2)
    decoded = decode_image(png(image, "PNG", transparency=1))
    assert decoded.mode == "RGBA" and decoded.getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_cut_anywhere_is_named(png, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    data = png(noise, kind)
    reasons = set()
    for cut in range(0, len(data) - 40, max(1, len(data) // 40)):
        with pytest.raises(ImageError) as error:
            decode_image(data[:cut])
        reasons.add(error.value.reason)
    assert reasons <= {"broken_image", "truncated_image"} and (kind == "WEBP" or "truncated_image" in reasons)


def test_garbage_is_a_broken_image():
    for data in (b"", b"no image", bytes(range(256)) * 10):
        with pytest.raises(ImageError) as error:
            decode_image(data)
        assert error.value.reason == "broken_image"


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    )


def test_a_large_image_is_refused_by_its_header(png):
    """No memory for its pixels is taken; Pillow's own warning about large images is not shown to the user."""
    for size in ((10_000, 10_000), (60_000, 60_000)):
        with pytest.raises(ImageError) as error:
            decode_image(_png_header(*size))
        assert error.value.reason == "too_large"
    image = png(Image.new("RGB", (20, 10)))
    assert decode_image(image, max_image_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="20x10 pixels, the limit is 199"):
        decode_image(image, max_image_pixels=199)
