import json

import pytest
import torch

from ov3fast.evaluation import metrics
from ov3fast.evaluation.reconstruction import reconstruct


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_model_and_vae_are_measured_apart(model, images):
    found = reconstruct(model, images, batch_size=2)
    scaled = images.float() / 127.5 - 1
    for by, expected in (("model", model.reconstruct(scaled)), ("vae", model.decode_latents(model.encode_to_latents(scaled)))):
        expected = ((expected.clamp(-1, 1) + 1) * 127.5).round()
        assert (getattr(found, by).float() - expected).abs().max() <= 1
        psnr = metrics.psnr(expected / 255, images / 255)
        torch.testing.assert_close(found.values[by]["psnr"], psnr, atol=0.02, rtol=0)
    assert set(found.values["model"]) == {"psnr", "ssim", "ssim_uniform", "latent_l1"}
    assert set(found.values["vae"]) == {"psnr", "ssim", "ssim_uniform"}
    latents = model.encode_to_latents(scaled)
    latents_hat = model.decode(model.encode_latents(latents)[1], (2, 3))
    torch.testing.assert_close(
        found.values["model"]["latent_l1"], (latents - latents_hat).abs().mean((1, 2, 3)).double(), atol=1e-5, rtol=1e-4
    )


def test_figures_do_not_depend_on_the_batch(model, images):
    one, three = reconstruct(model, images, batch_size=1), reconstruct(model, images, batch_size=3)
    for by, values in one.values.items():
        for name, value in values.items():
            # A pixel at the edge of two 8-bit levels may round either way.
            torch.testing.assert_close(value, three.values[by][name], atol=2e-3, rtol=1e-4)


def test_the_table_is_json_with_means_and_images(model, images):
    found = reconstruct(model, images)
    table = json.loads(json.dumps(found.table(list("abcde")), allow_nan=False))
    psnr = found.values["model"]["psnr"]
    assert table["count"] == 5 and [row["key"] for row in table["images"]] == list("abcde")
    assert table["model"]["psnr"]["mean"] == pytest.approx(psnr.mean().item())
    assert table["model"]["psnr"]["min"] == pytest.approx(min(row["model"]["psnr"] for row in table["images"]))
    assert "images" not in found.table()


def test_equal_images_are_null_in_json(images):
    class Same(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = type("Config", (), {"vision": type("Vision", (), {"patch_size": 2})})

        def encode_to_moments(self, x):
            return x

        def encode_moments(self, z):
            return None, z

        def get_vae(self):
            return self

        def from_moments(self, z):
            return z

        def decode(self, tokens, grid):
            return tokens

        def decode_latents(self, z):
            return z

    table = reconstruct(Same(), images).table(["k"] * 5)
    assert table["model"]["psnr"]["mean"] is None and table["images"][0]["vae"]["psnr"] is None
    assert table["model"]["ssim"]["mean"] == 1.0
    json.dumps(table, allow_nan=False)


def test_no_noise_is_added(model, images):
    first, second = reconstruct(model, images), reconstruct(model, images)
    assert torch.equal(first.model, second.model)


def test_errors(model):
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 3, H, W\] with N of at least 1, got torch.float32"):
        reconstruct(model, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        reconstruct(model, torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
