"""A model small enough to test in milliseconds, and a random VAE in FLUX's layout."""

import dataclasses

import pytest
import torch

from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import get_tokenizer
from ov3fast.models.vae import FLUX_VAE, FrozenVAE

TEXTS = ["a red apple", "a small dog on a table", "two blue birds"]


@pytest.fixture(scope="session")
def tokenizer():
    return get_tokenizer("wordpiece").restrict(TEXTS)


@pytest.fixture
def config(tokenizer) -> OpenVision3Config:
    config = OpenVision3Config(
        vision=VisionConfig(width=48, depth=2, heads=2, mlp_dim=80, image_size=64, embed_dim=40),
        decoder=DecoderConfig(width=32, depth=2, heads=2, mlp_dim=64),
        text=TextConfig(width=32, depth=2, heads=2, mlp_dim=64, context_length=12),
        caption=CaptionConfig(width=24, depth=2, heads=2, mlp_dim=48, length=10),
        vae="small",
    )
    return config.for_tokenizer(tokenizer)


@pytest.fixture
def build(config, tokenizer):
    """OpenVision3 with fields of the config, or of its caption config, replaced; the same weights each time."""

    def make(*, caption=None, **fields) -> OpenVision3:
        changed = dataclasses.replace(config, **fields)
        changed = dataclasses.replace(changed, caption=dataclasses.replace(changed.caption, **(caption or {})))
        torch.manual_seed(0)
        return OpenVision3(changed, tokenizer=tokenizer)

    return make


@pytest.fixture
def make_vae():
    """A random AutoencoderKL with 16 channels and stride 8."""

    def make(**fields) -> FrozenVAE:
        torch.manual_seed(1)
        small = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
        return FrozenVAE.from_config({**FLUX_VAE, **small, **fields})

    return make


@pytest.fixture
def flux_vae(make_vae) -> FrozenVAE:
    return make_vae()
