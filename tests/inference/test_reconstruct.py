import math

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.inference import VisionTower, read_image, reconstruct_file, reconstruct_image


def test_it_is_what_the_model_gives(model, folder):
    found = reconstruct_image(model, read_image(folder / "p0.png"))
    expected = model.reconstruct(found.original[None].float() / 127.5 - 1)[0]
    assert found.reconstruction.shape == (3, 32, 32)
    assert (found.reconstruction.float() - (expected + 1) * 127.5).abs().max() <= 0.51
    error = (found.reconstruction.double() - found.original.double()).square().mean().item()
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / error))
    alone = model.decode_latents(model.encode_to_latents(found.original[None].float() / 127.5 - 1))[0].clamp(-1, 1)
    assert (found.vae.float() - (alone + 1) * 127.5).abs().max() <= 0.51


@pytest.mark.parametrize(("options", "size"), [({}, (32, 32)), ({"size": 64}, (64, 64)), ({"keep_size": True}, (192, 96))])
def test_sizes(model, folder, options, size):
    assert reconstruct_image(model, read_image(folder / "p3.png"), **options).image().size == size  # 200 x 100


def test_the_file_is_the_picture(model, folder, tmp_path):
    found = reconstruct_file(model, folder / "p1.png", tmp_path / "new" / "out.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "out.png"))
    assert (torch.from_numpy(pixels.copy()).permute(2, 0, 1) == found.reconstruction).all()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.png"]


def test_side_by_side(model, folder, tmp_path):
    found = reconstruct_file(model, folder / "p1.png", tmp_path / "out.png", side_by_side=True)
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "out.png")).copy()).permute(2, 0, 1)
    assert pixels.shape == (3, 32, 96)
    assert (pixels[:, :, :32] == found.original).all() and (pixels[:, :, 32:64] == found.reconstruction).all()
    error = (found.reconstruction.int() - found.original.int()).abs() * 4
    assert (pixels[:, :, 64:] == error.clamp(max=255)).all()


def test_no_noise_is_added(model, folder):
    image = read_image(folder / "p4.png")
    assert torch.equal(reconstruct_image(model, image).reconstruction, reconstruct_image(model, image).reconstruction)


def test_errors(model, folder, tmp_path):
    image = read_image(folder / "p0.png")
    out = tmp_path / "out.png"
    with pytest.raises(ValueError, match="out must end in .png, got .*out.jpg"):
        reconstruct_file(model, folder / "p0.png", tmp_path / "out.jpg")
    with pytest.raises(FileNotFoundError, match="there is no image file .*nowhere.png"):
        reconstruct_file(model, folder / "nowhere.png", out)
    with pytest.raises(ValueError, match="can't read .*p3b.jpg"):
        reconstruct_file(model, folder / "p3b.jpg", out)
    with pytest.raises(ValueError, match="size must be a positive multiple of 16 pixels, got 40"):
        reconstruct_image(model, image, size=40)
    with pytest.raises(ValueError, match="set either size or keep_size, not both"):
        reconstruct_image(model, image, size=32, keep_size=True)
    with pytest.raises(ValueError, match="at least 16 pixels to keep its size, got 10 x 40"):
        reconstruct_image(model, image.resize((10, 40)), keep_size=True)
    with pytest.raises(ValueError, match="a released vision tower has no decoder"):
        reconstruct_image(VisionTower(model.encoder, model.get_vae()), image)
    assert not out.exists()
