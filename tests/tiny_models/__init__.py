"""Models and pictures small enough for tests: an OpenVision3 of 32 channels, a random VAE in FLUX's layout, smooth noise.

A folder's conftest imports the fixtures that its tests take; `tiny_config` is for models of other sizes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import Tokenizer, get_tokenizer
from ov3fast.models.vae import FLUX_VAE, FrozenVAE

SMALL_VAE = {**FLUX_VAE, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
Fields = Mapping[str, Any]


def tiny_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """WordPiece with the pieces of these texts alone."""
    return get_tokenizer("wordpiece").restrict(texts)


def tiny_config(
    tokenizer: Tokenizer, *, vision: Fields | None = None, decoder: Fields | None = None, text: Fields | None = None,
    caption: Fields | None = None, **fields: Any,
) -> OpenVision3Config:  # fmt: skip
    """32 px, two blocks in the encoder and one in each other tower; a part's fields can be replaced."""
    small = {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 48}
    config = OpenVision3Config(
        vision=VisionConfig(**{**small, "depth": 2, "image_size": 32, "embed_dim": 24, **(vision or {})}),
        decoder=DecoderConfig(**{**small, **(decoder or {})}),
        text=TextConfig(**{**small, "context_length": 10, **(text or {})}),
        caption=CaptionConfig(**{**small, "width": 24, "length": 6, **(caption or {})}),
        **fields,
    )
    return config.for_tokenizer(tokenizer)


def random_vae(**fields: Any) -> FrozenVAE:
    """An AutoencoderKL with 16 channels and stride 8; the same weights each time."""
    torch.manual_seed(1)
    return FrozenVAE.from_config({**SMALL_VAE, **fields})


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Smooth noise, so that resizing keeps something."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """training_run.py: a full training run."""
    from tiny_models import training_run

    return training_run


@pytest.fixture(scope="session")
def data(tiny, tmp_path_factory) -> Path:
    """Shards and a VAE for the training run; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def vae() -> FrozenVAE:
    return random_vae()


@pytest.fixture(scope="session")
def vae_folder(vae, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    vae.vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(vae) -> OpenVision3:
    """With a random VAE."""
    tokenizer = tiny_tokenizer(["a red square"])
    config = tiny_config(tokenizer)
    torch.manual_seed(0)
    return OpenVision3(config, vae=vae, tokenizer=tokenizer).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """7 good pictures of several sizes and formats, 2 broken ones, and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for i, (width, height) in enumerate([(64, 64), (50, 70), (33, 32), (200, 100), (48, 48)]):
        noise(i, width, height).save(folder / f"p{i}.png")
    noise(5, 60, 40).save(folder / "more" / "p5.jpg", quality=95)
    transparent = noise(6, 40, 40)
    transparent.putalpha(0)
    transparent.save(folder / "p6.webp", lossless=True)
    (folder / "p3b.jpg").write_bytes(b"this is no picture")
    data = (folder / "p0.png").read_bytes()
    (folder / "p0b.png").write_bytes(data[: len(data) // 2])
    (folder / "notes.txt").write_text("not a picture")
    return folder
