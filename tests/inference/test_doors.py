"""The model accepts images in every common form."""

import numpy as np
import pytest
import torch
from PIL import Image

import ov3fast
from ov3fast.inference import VisionTower, encode, reconstruct_image


def forms(path):
    pixels = np.array(Image.open(path))
    return [path, str(path), Image.open(path), pixels, torch.from_numpy(pixels).permute(2, 0, 1)]


def test_encode_caption_and_reconstruct(model, folder):
    images = ov3fast.preprocess(folder / "p1.png", 32)
    tower = VisionTower(model.encoder, model.get_vae())
    for form in forms(folder / "p1.png"):
        assert torch.equal(model.encode(form)[0], model.encode(images)[0])
        assert torch.equal(tower.encode(form)[0], tower.encode(images)[0])
        assert torch.equal(model.encode_image([form, form]), model.encode_image(images.repeat(2, 1, 1, 1)))
        assert model.caption(form) == model.caption(images)
        assert torch.equal(model.reconstruct(form), model.reconstruct(images))
        assert torch.equal(
            reconstruct_image(model, form).reconstruction, reconstruct_image(model, folder / "p1.png").reconstruction
        )


def test_encode_of_images_in_memory(model, folder):
    expected = encode(model, folder / "p1.png")
    found = encode(model, [folder / "p1.png", *forms(folder / "p1.png")[2:]])
    assert found.names == ["p1.png", "1", "2", "3"]
    torch.testing.assert_close(found.pooled, expected.pooled[:1].expand(4, -1), atol=1e-5, rtol=1e-5)
    assert encode(model, np.zeros((3, 40, 40, 3), np.uint8)).names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="float images are not resized"):
        encode(model, torch.zeros(3, 64, 64))


def test_floats_in_0_to_255_are_refused(model):
    images = torch.linspace(0, 255, 3 * 32 * 32).reshape(1, 3, 32, 32)
    for door in (
        model.encode,
        model.encode_image,
        model.caption,
        model.reconstruct,
        model.encoder.encode,
        lambda x: encode(model, x),
    ):
        with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], got .*255; give uint8, or images / 127.5 - 1"):
            door(images)
