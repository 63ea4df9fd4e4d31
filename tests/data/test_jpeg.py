"""simplejpeg gives the same pixels as Pillow, or Pillow decodes the file."""

import io

import numpy as np
import pytest
from PIL import Image

from ov3fast.data import jpeg
from ov3fast.data.images import ImageError, decode_image, decode_reduced

pytest.importorskip("simplejpeg")


def picture(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def orientated(image, value):
    exif = Image.Exif()
    exif[274] = value
    return encoded(image, exif=exif)


FILES = {
    "444": encoded(picture(61, 47), subsampling=0), "422": encoded(picture(61, 47), subsampling=1), "420": encoded(picture(61, 47)),
    "progressive": encoded(picture(61, 47), progressive=True), "rgb": encoded(picture(61, 47), keep_rgb=True),
    "one pixel": encoded(picture(1, 1)), "grey": encoded(picture(61, 47).convert("L")), "cmyk": encoded(picture(61, 47).convert("CMYK")),
    "turned": orientated(picture(61, 47), 6), "mirrored": orientated(picture(61, 47), 5),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_same_pixels_as_pillow(name, monkeypatch):
    fast = decode_image(FILES[name])
    monkeypatch.setattr(jpeg, "decoder", lambda: None)
    slow = decode_image(FILES[name])
    assert (fast.mode, fast.size, fast.info, fast.tobytes()) == (slow.mode, slow.size, slow.info, slow.tobytes())


def test_it_is_taken(monkeypatch):
    assert jpeg.pixels(FILES["420"]).shape == (47, 61, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("Pillow decoded it"))
    assert decode_image(FILES["420"]).size == (61, 47)


@pytest.mark.parametrize("cut", [3, 20, 100, 300, -2, -200])
def test_what_is_broken_has_pillows_reason(cut, monkeypatch):
    def reason():
        try:
            return decode_image(FILES["420"][:cut]).tobytes()
        except ImageError as error:
            return error.reason, str(error)

    fast = reason()
    monkeypatch.setattr(jpeg, "decoder", lambda: None)
    assert fast == reason()


def test_another_build_s_pixels_are_not_taken(monkeypatch):
    import simplejpeg

    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: real(*a, **k) ^ 1)
    jpeg.decoder.cache_clear()
    try:
        assert jpeg.decoder() is None and jpeg.pixels(FILES["420"]) is None
    finally:
        jpeg.decoder.cache_clear()


@pytest.mark.parametrize("reduction", jpeg.REDUCTIONS)
@pytest.mark.parametrize("name", FILES)
def test_smaller_ones_are_pillows_too(name, reduction, monkeypatch):
    fast, full = decode_reduced(FILES[name], lambda *_: reduction), decode_image(FILES[name])
    monkeypatch.setattr(jpeg, "decoder", lambda: None)
    slow = decode_reduced(FILES[name], lambda *_: reduction)
    if name in ("turned", "mirrored"):  # where the last row or column is rounded up to would be another side
        assert fast.tobytes() == slow.tobytes() == full.tobytes()
        return
    assert fast.mode == "RGB" and fast.pixels.tobytes() == slow.pixels.tobytes()
    assert (fast.full_size, fast.reduction) == (full.size, reduction)
    assert fast.size == tuple(-(-side // reduction) for side in full.size)
    if reduction == 1:
        assert fast.pixels.tobytes() == full.tobytes()


@pytest.mark.parametrize("cut", [3, 100, -200])
def test_a_broken_one_has_its_reason_at_any_size(cut):
    with pytest.raises(ImageError) as whole:
        decode_image(FILES["420"][:cut])
    with pytest.raises(ImageError) as smaller:
        decode_reduced(FILES["420"][:cut], lambda *_: 2)
    assert smaller.value.reason == whole.value.reason


def test_what_is_no_jpeg_is_decoded_whole():
    file = io.BytesIO()
    picture(61, 47).save(file, "PNG")
    assert decode_reduced(file.getvalue(), lambda *_: 8).tobytes() == picture(61, 47).tobytes()
