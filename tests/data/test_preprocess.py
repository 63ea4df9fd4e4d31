"""preprocess: every form of an image gives the same tensor."""

import numpy as np
import pytest
import torch
from PIL import Image

import ov3fast
from ov3fast.data.images import ImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_every_form_gives_the_same(path):
    expected = ov3fast.preprocess(path, 32)
    assert expected.shape == (1, 3, 32, 32) and expected.dtype == torch.float32 and -1 <= expected.min() <= expected.max() <= 1
    as_tensor = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    for form in (
        str(path),
        Image.open(path),
        Image.fromarray(PIXELS),
        PIXELS,
        as_tensor,
        [path],
        (PIXELS,),
        PIXELS[None],
        as_tensor[None],
    ):
        assert torch.equal(ov3fast.preprocess(form, 32), expected)
    mixed = ov3fast.preprocess([path, PIXELS, as_tensor, Image.fromarray(PIXELS)], 32)
    assert torch.equal(mixed, expected.expand(4, -1, -1, -1))
    assert ov3fast.preprocess(np.stack([PIXELS] * 3), 32).shape == (3, 3, 32, 32)


def test_without_resizing_it_is_the_pixels():
    square = PIXELS[:, :40]
    expected = torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(ov3fast.preprocess(square, 40)[0], expected, atol=1e-6, rtol=0)


def test_grey_and_transparent_images():
    grey = ov3fast.preprocess(PIXELS[:, :, 0], 32)
    assert torch.equal(grey, ov3fast.preprocess(PIXELS[:, :, :1], 32)) and torch.equal(grey[:, 0], grey[:, 2])
    clear = np.zeros((20, 20, 4), np.uint8)
    assert (ov3fast.preprocess(clear, 32) == 1).all()
    deep = Image.fromarray(np.full((20, 20), 0x80FF, np.uint16))
    assert torch.equal(ov3fast.preprocess(deep, 32), ov3fast.preprocess(np.full((20, 20), 0x80, np.uint8), 32))


def test_images_are_turned_upright_and_left_as_they_were(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    opened = Image.open(tmp_path / "turned.png")
    found = ov3fast.preprocess(opened, 16)
    assert torch.equal(found, ov3fast.preprocess(tmp_path / "turned.png", 16)) and opened.size == (40, 20)
    assert found[0, 2, 0].mean() > 0 > found[0, 2, -1].mean()


def test_floats_count_as_prepared():
    images = torch.rand(2, 3, 20, 30) * 2 - 1
    assert torch.equal(ov3fast.preprocess(images), images)
    assert torch.equal(ov3fast.preprocess([images[0], images[1:]]), images)


@pytest.mark.parametrize("high", [255.0, 2.0])
def test_floats_beyond_the_range_are_refused(high):
    with pytest.raises(ValueError, match=r"float images must lie in \[-1, 1\], got 0 to .*; give uint8, or images / 127.5 - 1"):
        ov3fast.preprocess(torch.linspace(0, high, 3 * 64).reshape(1, 3, 8, 8))
    with pytest.raises(ValueError, match="must lie in"):
        ov3fast.preprocess(torch.full((1, 3, 8, 8), torch.nan))


def test_errors_name_what_is_taken(tmp_path):
    for wrong, error, words in (
        (PIXELS.astype(np.float32), TypeError, "a numpy image must be uint8, 0..255, got float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"must be \[3, H, W\], got \(8, 8, 3\); .permute"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "must be uint8, got torch.int64"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, r"must be \[H, W\]"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"must be \[H, W\]"),
        (None, TypeError, "takes a Pillow image, a path, .* got NoneType"),
        ([], ValueError, "got an empty list"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 16, 16)], ValueError, "float tensors are not resized"),
    ):
        with pytest.raises(error, match=words):
            ov3fast.preprocess(wrong, 32)
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, got 0"):
        ov3fast.preprocess(PIXELS, 0)
    with pytest.raises(FileNotFoundError):
        ov3fast.preprocess(tmp_path / "nowhere.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError):
        ov3fast.preprocess(tmp_path / "broken.png")
