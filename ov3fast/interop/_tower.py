"""What the doors share: the vision half of whatever was given, and its residual stream after each block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ov3fast.inference.hidden_states import hidden_states
from ov3fast.inference.load import VisionTower, load_model
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE
from ov3fast.models.vit import ViTEncoder

__all__ = ["Model", "encode", "encoder_of", "hidden_states", "loaded", "vae_config"]

Model = OpenVision3 | VisionTower | ViTEncoder


def loaded(model: Model | str | Path, vae: FrozenVAE | str | Path | None = None) -> Model:
    """A model in memory as it is, else what `inference.load_model` gives."""
    return load_model(model, vae=vae) if isinstance(model, str | Path) else model


def encoder_of(model: Model) -> ViTEncoder:
    return model if isinstance(model, ViTEncoder) else model.encoder


def vae_config(vae: FrozenVAE) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKL, whichever class holds the weights."""
    config: Any = vae.vae.config
    values = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if not key.startswith("_")}


def encode(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled, tokens), as the model's own `encode` gives them."""
    found = model.encode(images)
    assert isinstance(found, tuple)
    return found
