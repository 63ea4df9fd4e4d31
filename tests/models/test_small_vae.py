"""The shipped VAE: its size, its latents, and its reconstruction of held-out photos."""

from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

import ov3fast
from ov3fast.evaluation.metrics import psnr
from ov3fast.models.vae import FrozenVAE

FOLDER = Path(ov3fast.__file__).parent / "assets" / "small_vae"


def photos(size: int = 128) -> torch.Tensor:
    tensors = []
    for read in (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee, skimage.data.rocket):
        image = Image.fromarray(read())
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        tensors.append(torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))))
    return torch.stack(tensors).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_held_out_photos():
    """The card states 25.02 dB on 28 photos; these four of them reach 26.55 dB."""
    vae = FrozenVAE.from_pretrained("small")
    images = photos()
    with torch.no_grad():
        latents = vae.encode(images)
        output = vae.decode(latents, "openvision3")
    assert latents.shape == (4, 16, 16, 16)
    assert 0.8 < float(latents.std()) < 1.3
    assert float(psnr((output.clamp(-1, 1) + 1) / 2, (images + 1) / 2).mean()) > 26.4


def test_files():
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    assert size <= 8_000_000
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors"} <= {file.name for file in FOLDER.iterdir()}
