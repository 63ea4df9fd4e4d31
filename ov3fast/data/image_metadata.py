"""Metadata of image files: the orientation that it asks for, and a file without it where it is broken."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF_KEYS = {"exif", "Raw profile type exif", "Raw profile type APP1", "xmp", "XML:com.adobe.xmp"}  # of Pillow's Image.info
_TRNS_LENGTHS = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}  # PNG colour type -> lengths of tRNS


def orientation(image: Image.Image) -> Image.Transpose | None:
    """How to turn a loaded image upright, by EXIF tag 274 (or XMP); None: it is upright, or its EXIF block is broken."""
    from PIL import Image

    if image.format != "TIFF" and not image.info.keys() & _EXIF_KEYS:
        return None  # Pillow would parse for it
    try:
        value = image.getexif().get(274, 1)
    except Exception:  # SyntaxError, struct.error, OSError and others: what is wrong with it doesn't matter to the pixels
        return None
    method = Image.Transpose
    turns = (
        method.FLIP_LEFT_RIGHT, method.ROTATE_180, method.FLIP_TOP_BOTTOM, method.TRANSPOSE,
        method.ROTATE_270, method.TRANSVERSE, method.ROTATE_90,
    )  # fmt: skip
    return turns[value - 2] if isinstance(value, int) and 2 <= value <= 8 else None


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file with only what its pixels need; anything else, or what can't be followed, as it is.

    Pillow refuses a whole file for a broken ancillary chunk or application segment.
    """
    try:
        if data.startswith(_PNG):
            return _bare_png(data)
        if data.startswith(b"\xff\xd8"):
            return _bare_jpeg(data)
    except (struct.error, IndexError):
        pass
    return data


def _bare_png(data: bytes) -> bytes:
    """Critical chunks, and tRNS where it is whole."""
    kept, offset = [_PNG], len(_PNG)
    while offset < len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + length
        needed = kind[:1].isupper()
        if kind == b"tRNS" and end <= len(data):
            (crc,) = struct.unpack_from(">I", data, end - 4)
            needed = length in _TRNS_LENGTHS.get(data[25], ()) and crc == zlib.crc32(data[offset + 4 : end - 4])
        if needed:
            kept.append(data[offset:end])
        offset = end
    return b"".join(kept)


def _bare_jpeg(data: bytes) -> bytes:
    """All but the APPn and COM segments; Adobe's APP14 stays where it is whole, since it names the colour space."""
    kept, offset = [data[:2]], 2
    while data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        if marker == 0xDA:  # the scan: no segments after it
            break
        (length,) = struct.unpack_from(">H", data, offset + 2)
        segment = data[offset : offset + 2 + length]
        whole_adobe = marker == 0xEE and length >= 14 and segment[4:9] == b"Adobe"
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or whole_adobe:
            kept.append(segment)
        offset += 2 + length
    return b"".join([*kept, data[offset:]])
