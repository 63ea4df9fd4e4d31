import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.data.transforms import center_boxes, crop_resize, inception_boxes, premultiplied, to_tensor


def test_inception_crops_keep_their_area_and_ratio():
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 400, (2000, 2))
    boxes = inception_boxes(sizes, rng.random((2000, 10, 4)), (0.4, 1.0))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= sizes + 1e-9).all()
    ratio, share = width / height, width * height / sizes.prod(1)
    assert (ratio > 0.75 - 1e-9).all() and (ratio < 4 / 3 + 1e-9).all()
    moderate = (sizes[:, 0] / sizes[:, 1] < 2) & (sizes[:, 1] / sizes[:, 0] < 2)
    assert (share[moderate] >= 0.4 - 1e-9).all() and share[moderate].std() > 0.1


def test_a_picture_too_long_for_any_crop_gives_its_largest_centre():
    uniforms = np.random.default_rng(1).random((1, 10, 4))
    np.testing.assert_allclose(inception_boxes([[1000, 30]], uniforms), [[480, 0, 520, 30]])
    np.testing.assert_allclose(inception_boxes([[30, 1000]], uniforms), [[0, 480, 30, 520]])


def test_center_boxes():
    np.testing.assert_allclose(center_boxes([[30, 20], [20, 25], [8, 8]]), [[5, 0, 25, 20], [0, 2.5, 20, 22.5], [0, 0, 8, 8]])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_antialiases(interpolation):
    """A one-pixel checkerboard, downscaled eightfold, is grey; without antialiasing it would be black or white."""
    board = Image.fromarray((255 * (np.indices((128, 128)).sum(0) % 2)).astype(np.uint8)).convert("RGB")
    small = crop_resize(board, (0, 0, 128, 128), 16, interpolation)
    assert small.shape == (16, 16, 3) and np.abs(small.astype(int) - 128).max() <= 2


def test_the_gap_is_close_to_the_exact_filter():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).resize((384, 320), Image.Resampling.BICUBIC)
    exact, fast = (crop_resize(smooth, (3.3, 5.1, 350.2, 310.4), 32, gap=gap).astype(int) for gap in (None, 1.5))
    assert np.abs(exact - fast).mean() < 3


def test_transparent_colours_do_not_bleed():
    """A dark red square on transparent green, composited over white: every pixel is between dark red and white, never green."""
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((128, 0, 0, 255), (19, 21, 43, 45))
    x = to_tensor(crop_resize(premultiplied(image), (0, 0, 64, 64), 16, "bilinear")[None])[0]
    assert x.shape == (3, 16, 16) and torch.equal(x[1], x[2])
    cover = (1 - x[1]) / 2
    assert cover.min() < 0.01 and cover.max() > 0.99 and ((cover > 0.1) & (cover < 0.9)).any()
    torch.testing.assert_close(x[0], 1 - cover * 2 * 127 / 255, rtol=0, atol=0.02)


def test_to_tensor_scales_and_composites():
    pictures = np.zeros((2, 1, 2, 4), np.uint8)
    pictures[0, 0, 0] = (255, 0, 51, 255)
    pictures[1, 0, 1] = (100, 50, 0, 128)
    background = np.array([[0.0, 255.0, 127.5], [200.0, 0.0, 255.0]])
    x = to_tensor(pictures, background)
    assert x.dtype == torch.float32 and x.is_contiguous() and x.shape == (2, 3, 1, 2)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.6]))
    torch.testing.assert_close(x[0, :, 0, 1], torch.tensor([-1.0, 1.0, 0.0]))
    under = torch.tensor([200.0, 0.0, 255.0]) * 127 / 255
    torch.testing.assert_close(x[1, :, 0, 1], (torch.tensor([100.0, 50.0, 0.0]) + under) / 127.5 - 1)
    torch.testing.assert_close(to_tensor(pictures)[1, :, 0, 0], torch.ones(3))
    assert to_tensor(np.full((1, 2, 2, 3), 255, np.uint8)).eq(1).all()
