"""Fixture: an untrained model."""

import pytest
import torch
from tiny_models import tiny_config, tiny_tokenizer

from ov3fast.models.openvision3 import OpenVision3


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folder of an untrained model with the shipped VAE."""
    tokenizer = tiny_tokenizer(["a red apple"])
    config = tiny_config(
        tokenizer, vae="small",
        vision={"width": 24, "depth": 1, "mlp_dim": 32, "embed_dim": 16}, decoder={"width": 24, "mlp_dim": 32},
        text={"width": 16, "mlp_dim": 32, "context_length": 8}, caption={"width": 16, "mlp_dim": 32, "length": 8},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    OpenVision3(config, tokenizer=tokenizer).save_pretrained(folder)
    return folder
