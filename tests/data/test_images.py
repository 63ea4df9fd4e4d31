import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from ov3fast.data.image_metadata import frames
from ov3fast.data.images import DECODE_VERSION, ImageError, decode_image


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
    """Its pixels are never allocated, and Pillow's own warning about large images is not shown."""
    for size in ((10_000, 10_000), (60_000, 60_000)):
        with pytest.raises(ImageError) as error:
            decode_image(_png_header(*size))
        assert error.value.reason == "too_large"
    image = png(Image.new("RGB", (20, 10)))
    assert decode_image(image, max_image_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="20x10 pixels, the limit is 199"):
        decode_image(image, max_image_pixels=199)


# ---- depths ------------------------------------------------------------------------------------------------------------

RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)


def grey(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    red, green, blue = np.asarray(image).transpose(2, 0, 1)
    assert (red == green).all() and (red == blue).all()
    return red


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_16_bits_keep_the_high_byte(png, kind):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    assert np.array_equal(grey(png(Image.fromarray(RAMP), kind, **options)), RAMP >> 8)


def test_big_endian_and_12_bit_and_white_is_zero_tiff():
    assert np.array_equal(grey(tiff(RAMP.astype(">u2").tobytes(), b"MM\0*")), RAMP >> 8)
    assert np.array_equal(grey(tiff(RAMP.astype("<u2").tobytes(), photometric=0)), 255 - (RAMP >> 8))
    twelve = (RAMP >> 4).reshape(-1, 2).astype(np.int64)
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], 1)
    assert np.array_equal(grey(tiff(packed.astype(np.uint8).tobytes(), bits=12)), RAMP >> 8)


def tiff(pixels: bytes, byte_order: bytes = b"II*\0", bits: int = 16, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey 32 x 32 TIFF of one strip."""
    tags = {256: 32, 257: 32, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 32, 279: len(pixels), 339: sample_format}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    order = "<" if byte_order.startswith(b"II") else ">"
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags)]
    return byte_order + struct.pack(f"{order}IH", 8, len(tags)) + b"".join(entries) + bytes(4) + pixels


def test_16_bit_colour_and_transparency():
    """A 16-bit RGB PNG, and a 16-bit grey one with one transparent value."""
    colour = np.stack([RAMP, RAMP.T, 65535 - RAMP], -1)
    assert np.array_equal(np.asarray(decode_image(png16(colour))), colour >> 8)
    clear = decode_image(png16(RAMP[..., None], transparent=(int(RAMP[3, 5]),)))
    assert clear.mode == "RGBA" and np.array_equal(np.asarray(clear)[..., 3] == 0, RAMP == RAMP[3, 5])
    assert np.array_equal(np.asarray(clear)[..., 1], RAMP >> 8)
    # Pillow has no 16-bit RGB, so a 16-bit transparent colour can't be told from its neighbours; only the pixels are compared.
    assert np.array_equal(np.asarray(decode_image(png16(colour, transparent=(300, 60000, 5))).convert("RGB")), colour >> 8)


def png16(pixels_HWC: np.ndarray, transparent: tuple[int, ...] = ()) -> bytes:
    height, width, channels = pixels_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if transparent:
        chunks.insert(1, (b"tRNS", struct.pack(f">{channels}H", *transparent)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, chunks))


def chunk(kind_and_data: tuple[bytes, bytes]) -> bytes:
    kind, data = kind_and_data
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_floats_are_read_from_0_to_1_and_the_rest_is_named(png):
    unit = RAMP.astype(np.float32) / 65535
    assert np.array_equal(grey(png(Image.fromarray(unit), "TIFF")), np.round(unit.astype(np.float64) * 255))
    for samples in (unit * 255, -unit, np.where(unit > 0.5, np.nan, unit).astype(np.float32), RAMP.astype(np.int32)):
        with pytest.raises(ImageError) as error:
            decode_image(png(Image.fromarray(samples), "TIFF"))
        assert error.value.reason == "unsupported_depth"


# ---- orientation and broken metadata -----------------------------------------------------------------------------------

CORNER = Image.new("RGB", (32, 16))
CORNER.paste((255, 0, 0), (0, 0, 8, 8))


def exif(value: int) -> bytes:
    block = Image.Exif()
    block[274] = value
    return block.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    "value, size, red",
    [
        (1, (32, 16), (4, 4)), (2, (32, 16), (27, 4)), (3, (32, 16), (27, 11)), (4, (32, 16), (4, 11)),
        (5, (16, 32), (4, 4)), (6, (16, 32), (11, 4)), (7, (16, 32), (11, 27)), (8, (16, 32), (4, 27)),
    ],
)  # fmt: skip
def test_images_are_upright(png, kind, value, size, red):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    options = {"exif": exif(value), **({"lossless": True} if kind == "WEBP" else {})}
    image = decode_image(png(CORNER, kind, **options))
    assert image.size == size and image.getpixel(red)[0] > 200
    assert sum(np.asarray(image)[..., 0].ravel() > 128) in range(60, 69)
    assert ImageOps.exif_transpose(image).size == size  # the orientation tag is gone, so it can't be applied twice


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


@pytest.mark.parametrize(
    "marker, payload",
    [
        (0xE1, b"Exif\0\0garbage!"), (0xE1, b"Exif\0\0"), (0xE1, exif(6)[:-7]), (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        (0xE2, b"ICC_PROFILE\0"), (0xE0, b"JFIF\0\x01"), (0xEE, b"Adobe"), (0xED, b"Photoshop 3.0\0"), (0xE2, b"MPF\0II*\0"),
    ],
)  # fmt: skip
def test_broken_jpeg_metadata_is_ignored_and_the_pixels_kept(png, marker, payload):
    plain = png(CORNER, "JPEG")
    image = decode_image(with_segment(plain, marker, payload))
    assert image.size in ((32, 16), (16, 32)) and np.array_equal(
        np.sort(np.asarray(image), None), np.sort(decode_image(plain), None)
    )


@pytest.mark.parametrize("kind", [b"eXIf", b"iCCP", b"pHYs", b"gAMA", b"cHRM", b"tRNS", b"acTL", b"fcTL", b"zTXt", b"tEXt"])
@pytest.mark.parametrize("crc", [None, 1])
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_broken_png_metadata_is_ignored_and_the_pixels_kept(png, kind, crc, place):
    plain = png(CORNER)
    broken = chunk((kind, b"x"))
    broken = broken if crc is None else broken[:-4] + struct.pack(">I", crc)
    at = plain.index(place) - 4
    image = decode_image(plain[:at] + broken + plain[at:])
    assert np.array_equal(np.asarray(image), np.asarray(CORNER))


def test_a_broken_picture_stays_broken_without_its_metadata(png):
    plain = png(CORNER)
    at = plain.index(b"IDAT") + 6
    with pytest.raises(ImageError, match="broken|truncated|not identify|identif") as error:
        decode_image(plain[:at] + b"\xff\xff\xff\xff" + plain[at + 4 :])
    assert error.value.reason in ("broken_image", "truncated_image")


# ---- kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(png, kind):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(png(red, kind, save_all=True, append_images=[blue], **options))
    assert image.convert("RGB").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "AVIF", "WEBP", "TIFF", "PPM", "JPEG2000"])
def test_every_kind_that_has_a_suffix_is_read(png, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    assert decode_image(png(CORNER, kind)).size == (32, 16)


def test_other_kinds_are_named_and_never_handed_to_other_programs(png):
    for data in (png(CORNER, "EPS"), b"\0\0\0\x18ftypheic" + bytes(40), b"8BPS" + bytes(40)):
        with pytest.raises(ImageError) as error:
            decode_image(data)
        assert error.value.reason == "unsupported_format"


def test_cmyk_and_palettes_keep_their_colours(png):
    cmyk = decode_image(png(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert cmyk.getpixel((0, 0)) == (255, 0, 0)
    palette = CORNER.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(np.asarray(decode_image(png(palette))), np.asarray(CORNER))


def test_a_bomb_in_the_metadata_is_named(png):
    plain = png(CORNER)
    at = plain.index(b"IDAT") - 4
    bomb = chunk((b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000))))
    with pytest.raises(ImageError) as error:
        decode_image(plain[:at] + bomb + plain[at:])
    assert error.value.reason == "too_large"


def test_pixels_and_their_version_change_together(png):
    """Caches of decoded pictures depend on DECODE_VERSION: if decoding was meant to change, raise it and update this checksum."""
    grey = np.arange(64 * 4, dtype=np.uint16).reshape(8, 32) * 257
    palette = Image.fromarray((np.arange(64, dtype=np.uint8) % 4).reshape(8, 8), "P")
    palette.putpalette([0, 0, 0, 250, 9, 9, 9, 250, 9, 9, 9, 250])
    turned = Image.Exif()
    turned[274] = 6
    colours = Image.fromarray((np.arange(8 * 5 * 3, dtype=np.uint8) * 2).reshape(8, 5, 3))
    files = [
        png(Image.fromarray(grey), "PNG"),
        png(palette, "PNG", transparency=1),
        png(colours, "PNG", exif=turned),
        png(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
        png(colours.convert("LA"), "PNG"),
    ]
    sums = [zlib.crc32(np.asarray(decode_image(file)).tobytes()) for file in files]
    assert (DECODE_VERSION, sums) == (2, [2753584608, 1941892597, 3740166476, 2171395674, 2515941070])


# ---- frames ----------------------------------------------------------------------------------------------------------


def animation(kind: str, count: int) -> bytes:
    pictures = [Image.new("RGB", (20, 20), (40 * i, 0, 255 - 40 * i)) for i in range(count)]
    file = io.BytesIO()
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:])
    return file.getvalue()


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_frames_are_counted_up_to_the_limit(kind):
    assert frames(animation(kind, 1), 9) == 1
    data = animation(kind, 5)
    assert [frames(data, limit) for limit in (2, 4, 5, 100)] == [3, 5, 5, 5]
    with pytest.raises(ImageError) as refused:
        decode_image(data, max_frames=4)
    assert refused.value.reason == "too_many_frames"
    assert decode_image(data, max_frames=5).size == decode_image(data).size == (20, 20)


def test_frames_of_what_cannot_be_followed():
    for kind in ("gif", "png", "webp", "tiff"):
        data = animation(kind, 3)
        for cut in range(0, len(data), 7):
            assert frames(data[:cut], 9) <= 3
    assert frames(b"", 9) == frames(b"GIF89a", 9) == 1
    loop = struct.pack("<2sHIHII", b"II", 42, 8, 0, 8, 0)  # its one page names itself as the next
    assert frames(loop, 50) == 51
    big = struct.pack("<2sHHHQQQQQ", b"II", 43, 8, 0, 16, 0, 32, 0, 0)  # BigTIFF: a page at 16, another at 32
    assert frames(big, 50) == 2
