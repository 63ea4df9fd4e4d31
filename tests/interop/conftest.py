"""A tiny model with a random VAE, its released-tower form, and pictures."""

import copy
import dataclasses

import pytest
import torch
from PIL import Image
from tiny_models import model, noise, vae, vae_folder

from ov3fast.inference import VisionTower
from ov3fast.models.config import VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vit import ViTEncoder


@pytest.fixture(scope="session")
def model_folder(model, vae_folder, tmp_path_factory):
    """The model on disk, its VAE named in its config."""
    folder = tmp_path_factory.mktemp("model") / "model"
    named = OpenVision3(dataclasses.replace(model.config, vae=str(vae_folder)), tokenizer=model.tokenizer)
    named.load_state_dict(model.state_dict())
    named.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    return noise(0, 70, 50)


def released(model: OpenVision3) -> VisionTower:
    """The vision half alone, as a release has it."""
    return VisionTower(copy.deepcopy(model.encoder), model.get_vae())


def own_positions(model: OpenVision3) -> ViTEncoder:
    """A tower with a table of positions, and its norm before the pool."""
    torch.manual_seed(7)
    encoder = ViTEncoder(
        VisionConfig(width=32, depth=2, heads=2, mlp_dim=48, image_size=32, embed_dim=24, final_ln_after_pool=False)
    )
    encoder.set_position_embedding(torch.randn(5, 32))
    encoder.set_vae(model.get_vae())
    return encoder.eval()
