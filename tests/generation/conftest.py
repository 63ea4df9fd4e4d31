"""An untrained model."""

import pytest
import torch

from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import get_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An untrained model with the shipped VAE, in a folder."""
    tokenizer = get_tokenizer("wordpiece").restrict(["a red apple"])
    config = OpenVision3Config(
        vision=VisionConfig(width=24, depth=1, heads=2, mlp_dim=32, image_size=32, embed_dim=16),
        decoder=DecoderConfig(width=24, depth=1, heads=2, mlp_dim=32),
        text=TextConfig(width=16, depth=1, heads=2, mlp_dim=32, context_length=8),
        caption=CaptionConfig(width=16, depth=1, heads=2, mlp_dim=32, length=8),
        vae="small",
    ).for_tokenizer(tokenizer)
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    OpenVision3(config, tokenizer=tokenizer).save_pretrained(folder)
    return folder
