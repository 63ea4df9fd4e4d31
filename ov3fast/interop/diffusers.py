"""The door to diffusers: an autoencoder whose latents are the unified tokens, for what takes AutoencoderKL or AutoencoderRAE.

autoencoder = AutoencoderOpenVision3.from_model("runs/demo")
latent = autoencoder.encode(images).latent        # [B, D, h, w]
images = autoencoder.decode(latent).sample        # [B, 3, H, W]
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor

from ov3fast.generation.moments import ElementMoments
from ov3fast.generation.statistics import EPS
from ov3fast.interop._tower import loaded, vae_config
from ov3fast.models.config import DecoderConfig, VisionConfig, to_dict
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE
from ov3fast.models.vit import ViTDecoder, ViTEncoder


class AutoencoderOpenVision3(ModelMixin, ConfigMixin):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, D, h, w], one per 16 x 16 pixels, (z - latents_mean) / sqrt(latents_var + 1e-5).

    latents_mean, latents_var [D, h, w] are zeros and ones until `set_statistics`; they are saved with the weights, which hold the VAE too.
    scaling_factor is 1 and there is no shift: the statistics are the scaling. No noise is added. Sizes other than the config's run while
    the statistics are the same at every place.
    """

    @register_to_config
    def __init__(
        self,
        vision_config: dict[str, Any],
        decoder_config: dict[str, Any],
        vae_config: dict[str, Any],
        latent_convention: str = "openvision3",
        tokens: str = "pre_ln",
        scaling_factor: float = 1.0,
        learned_positions: bool = False,
    ) -> None:
        super().__init__()
        config = VisionConfig(**vision_config)
        self.vae = AutoencoderKL.from_config(vae_config)
        self.encoder = ViTEncoder(config, latent_convention)
        if learned_positions:
            self.encoder.set_position_embedding(torch.zeros(config.grid**2 + 1, config.width))
        self.encoder.set_vae(FrozenVAE(self.vae))
        self.decoder = ViTDecoder(DecoderConfig(**decoder_config), config.width, config.in_channels, config.patch_size)
        self.register_buffer("latents_mean", torch.zeros(config.width, config.grid, config.grid))
        self.register_buffer("latents_var", torch.ones(config.width, config.grid, config.grid))

    @classmethod
    def from_model(cls, model: OpenVision3 | str | Path, vae: FrozenVAE | str | Path | None = None) -> AutoencoderOpenVision3:
        """The same weights, copied, in the same dtypes; in eval mode. model: in memory, or what `inference.load_model` takes. ValueError for a released
        tower, which has no decoder."""
        given = loaded(model, vae)
        if not isinstance(given, OpenVision3):
            raise ValueError("AutoencoderOpenVision3: a released vision tower has no decoder; give an OpenVision3")
        model = given
        own = model.get_vae().vae
        made = cls(
            vision_config=to_dict(model.config.vision),
            decoder_config=to_dict(model.config.decoder),
            vae_config=vae_config(model.get_vae()),
            latent_convention=model.config.latent_convention,
            tokens=model.config.tokens,
            learned_positions=model.encoder.pos_embed is not None,
        )
        for part, source in ((made.vae, own), (made.encoder, model.encoder), (made.decoder, model.decoder)):
            part.to(next(source.parameters()).dtype).load_state_dict(source.state_dict())
        return made.to(model.device).eval()

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images -> an output whose `latent` is [B, D, h, w]."""
        found = self.encoder.encode(x, post_ln=self.config.tokens == "post_ln")
        tokens = found[1]
        patch = 8 * self.encoder.config.patch_size
        latent = tokens.transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))
        mean, deviation = self._statistics(latent)
        latent = (latent - mean) / deviation
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Latents [B, D, h, w] -> an output whose `sample` is [B, 3, H, W], about [-1, 1]."""
        mean, deviation = self._statistics(z)
        tokens = (z * deviation + mean).flatten(2).transpose(1, 2)
        latents = self.decoder(tokens.contiguous(), tuple(z.shape[2:]))
        sample = self.encoder.get_vae().decode(latents, self.config.latent_convention)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        return self.decode(self.encode(sample).latent, return_dict)

    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """mean, var [D, h, w] or [D, 1, 1]: `latent_statistics` gives them."""
        self.latents_mean.copy_(mean)
        self.latents_var.copy_(var)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.latents_mean, self.latents_var
        if mean.shape[1:] != like.shape[2:]:
            mean, var = mean[:, :1, :1], var[:, :1, :1]
            if not (
                torch.equal(mean.expand_as(self.latents_mean), self.latents_mean)
                and torch.equal(var.expand_as(self.latents_var), self.latents_var)
            ):
                raise ValueError(
                    f"AutoencoderOpenVision3: the statistics are of {tuple(self.latents_mean.shape[1:])} places, "
                    f"got {tuple(like.shape[2:])}"
                )
        return mean.to(like), (var + EPS).sqrt().to(like)


@torch.no_grad()
def latent_statistics(autoencoder: Any, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact mean and (biased) variance [D, h, w] of the un-normalised latents of batches of images: float64 sums by Chan's rule, so that
    neither batch size nor order matters beyond rounding (`ov3fast statistics` writes them). ValueError without an image."""
    moments = ElementMoments()
    for images in batches:
        latent = autoencoder.encode(images).latent
        mean, deviation = autoencoder._statistics(latent)
        moments.add(latent * deviation + mean)
    if not moments.count:
        raise ValueError("latent_statistics: got no image")
    return moments.mean, moments.var
