"""Pixels in place of a VAE's latents: what the encoder is without a VAE (arXiv 2601.15369, section 5.2).

An image's 8 x 8 blocks become the 192 channels of a "latent" and back, without loss, so that a ViT/2 on them is a ViT/16 on the image and
everything that takes a FrozenVAE takes this: `model.vae="pixels"`, `model.vision.in_channels=192`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import AutoencoderConfig, Decoded, Encoded, Posterior
from .config import VAE_STRIDE

PIXELS = "pixels"
"""Its name where a VAE is asked for."""

CHANNELS = 3 * VAE_STRIDE**2
LOG_VARIANCE = -30.0
"""The least that the posterior's log-variance takes: a sample is the mean."""


class PixelAutoencoder(nn.Module):
    """Images [B, 3, H, W] <-> [B, 192, H / 8, W / 8], in an Autoencoder's place."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = AutoencoderConfig(latent_channels=CHANNELS, block_out_channels=(CHANNELS,) * 4, scaling_factor=1.0)
        # A module's dtype and device are those of its parameters, so there is one.
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def encode(self, images: Tensor) -> Encoded:
        mean = F.pixel_unshuffle(images, VAE_STRIDE)
        return Encoded(Posterior(torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], dim=1)))

    def decode(self, z: Tensor) -> Decoded:
        return Decoded(F.pixel_shuffle(z, VAE_STRIDE))
