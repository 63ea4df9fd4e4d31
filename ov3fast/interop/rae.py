"""RAE's stage-1 protocol (bytetriper/RAE): patch_size, hidden_size, encode(x) -> tokens [B, N, C]."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ov3fast.interop._tower import Model, encode, encoder_of, loaded
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.vae import FrozenVAE


class Stage1Encoder(nn.Module):
    """A frozen encoder of RAE's stage 1. Images are [-1, 1], what RAE's (x - 0.5) / 0.5 makes of [0, 1]; image_mean and image_std say so."""

    image_mean, image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, model: Model | str | Path, vae: FrozenVAE | str | Path | None = None) -> None:
        super().__init__()
        self.model = loaded(model, vae).requires_grad_(False).eval()
        config = encoder_of(self.model).config
        self.patch_size = config.patch_size * VAE_STRIDE
        self.hidden_size = config.width

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> tokens [B, N, C], without CLS."""
        return encode(self.model, x)[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)
