"""A tiny model with a random VAE, its released-tower form, and pictures."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.inference import VisionTower
from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import get_tokenizer
from ov3fast.models.vae import FLUX_VAE, FrozenVAE
from ov3fast.models.vit import ViTEncoder

SMALL_VAE = {**FLUX_VAE, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}


@pytest.fixture(scope="session")
def vae() -> FrozenVAE:
    torch.manual_seed(1)
    return FrozenVAE.from_config(SMALL_VAE)


@pytest.fixture(scope="session")
def vae_folder(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae.vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(vae) -> OpenVision3:
    tokenizer = get_tokenizer("wordpiece").restrict(["a red square"])
    config = OpenVision3Config(
        vision=VisionConfig(width=32, depth=2, heads=2, mlp_dim=48, image_size=32, embed_dim=24),
        decoder=DecoderConfig(width=32, depth=1, heads=2, mlp_dim=48),
        text=TextConfig(width=32, depth=1, heads=2, mlp_dim=48, context_length=10),
        caption=CaptionConfig(width=24, depth=1, heads=2, mlp_dim=48, length=6),
    ).for_tokenizer(tokenizer)
    torch.manual_seed(0)
    return OpenVision3(config, vae=vae, tokenizer=tokenizer).eval()


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Smooth noise, so that resizing keeps something."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


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
