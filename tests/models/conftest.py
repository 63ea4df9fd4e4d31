"""A model small enough to test in milliseconds, and a random VAE in FLUX's layout."""

import dataclasses

import pytest
import torch
from tiny_models import random_vae, tiny_config, tiny_tokenizer

from ov3fast.models.config import OpenVision3Config
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE

TEXTS = ["a red apple", "a small dog on a table", "two blue birds"]


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer(TEXTS)


@pytest.fixture
def config(tokenizer) -> OpenVision3Config:
    return tiny_config(
        tokenizer, vae="small",
        vision={"width": 48, "mlp_dim": 80, "image_size": 64, "embed_dim": 40}, decoder={"depth": 2, "mlp_dim": 64},
        text={"depth": 2, "mlp_dim": 64, "context_length": 12}, caption={"depth": 2, "length": 10},
    )  # fmt: skip


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

    return lambda **fields: random_vae(**{"block_out_channels": [8, 8, 16, 16], **fields})


@pytest.fixture
def flux_vae(make_vae) -> FrozenVAE:
    return make_vae()
