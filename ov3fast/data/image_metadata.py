"""Metadata of image files: orientation, number of frames, and stripping it from files where it is broken."""

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
    """How to turn a loaded image upright, from EXIF tag 274 (or XMP); None: it is upright, or its EXIF block is broken."""
    from PIL import Image

    if image.format != "TIFF" and not image.info.keys() & _EXIF_KEYS:
        return None  # without this check Pillow parses the file for EXIF
    try:
        value = image.getexif().get(274, 1)
    except Exception:  # SyntaxError, struct.error, OSError and others: broken EXIF doesn't affect the pixels
        return None
    method = Image.Transpose
    turns = (
        method.FLIP_LEFT_RIGHT, method.ROTATE_180, method.FLIP_TOP_BOTTOM, method.TRANSPOSE,
        method.ROTATE_270, method.TRANSVERSE, method.ROTATE_90,
    )  # fmt: skip
    return turns[value - 2] if isinstance(value, int) and 2 <= value <= 8 else None


def frames(data: bytes, limit: int) -> int:
    """How many frames or pages a file declares, at most limit + 1; 1 if its structure can't be followed.

    Read from the container's structure: Pillow would go through all of a GIF's or TIFF's frames, however many.
    """
    try:
        if data[:4] == b"GIF8":
            return _gif_frames(data, limit)
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff_pages(data, limit)
        if data.startswith(_PNG):
            place = data.find(b"acTL", 0, 1 << 16)
            return min(struct.unpack_from(">I", data, place + 4)[0], limit + 1) if place > 0 else 1
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_frames(data, limit)
    except (struct.error, IndexError):
        pass  # truncated: decoding reports it
    return 1


def _gif_frames(data: bytes, limit: int) -> int:
    def color_table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    count, place = 0, 13 + color_table(data[10])
    while count <= limit and data[place] != 0x3B:
        if data[place] == 0x2C:
            count += 1
            place += 11 + color_table(data[place + 9])
        else:
            place += 2
        while data[place]:  # sub-blocks
            place += 1 + data[place]
        place += 1
    return count


def _tiff_pages(data: bytes, limit: int) -> int:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    offset, length, entry, at = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 4)
    count = 0
    (place,) = struct.unpack_from(order + offset, data, at)
    while place and count <= limit:
        count += 1
        (entries,) = struct.unpack_from(order + length, data, place)
        (place,) = struct.unpack_from(order + offset, data, place + struct.calcsize(length) + entry * entries)
    return count


def _webp_frames(data: bytes, limit: int) -> int:
    count, place = 0, 12
    while place + 8 <= len(data) and count <= limit:
        kind, length = struct.unpack_from("<4sI", data, place)
        count += kind == b"ANMF"
        place += 8 + length + length % 2
    return max(count, 1)


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file reduced to what its pixels need; other files, and those that can't be parsed, are returned unchanged.

    Pillow rejects a whole file for a broken ancillary chunk or application segment.
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
    """Critical chunks, and tRNS if it is intact."""
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
    """All but the APPn and COM segments; Adobe's APP14 stays if it is intact, since it names the colour space."""
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
