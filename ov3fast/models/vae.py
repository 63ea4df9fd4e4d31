"""The frozen image VAE (an AutoencoderKL) and the two conventions for its latents.

    openvision3     z * scaling_factor                    the authors' openvision3_test.py
    flux            (z - shift_factor) * scaling_factor   FLUX.1's own pipeline

z is the posterior's mean or a sample. The model's config holds the name; latents of one convention must not be decoded in the other, so
a VAE bound to one raises for the other.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import autoencoder, noise, pretrained
from .autoencoder import Autoencoder, AutoencoderConfig
from .group_norm_silu import fuse_group_norm_silu
from .pixels import PIXELS, PixelAutoencoder
from .upsample import fold_upsampling

CONVENTIONS = ("openvision3", "flux")

SMALL = "small"
"""Name of the VAE that ships with the package."""

FLUX_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
"""vae/config.json of FLUX.1-dev: enough to count its parameters and FLOPs without its weights."""


def to_latents(z: Tensor, convention: str, scaling_factor: float, shift_factor: float | None = None) -> Tensor:
    """The VAE's own z -> what the model sees."""
    scale, shift = scale_and_shift(convention, scaling_factor, shift_factor)
    return (z - shift) * scale if shift else z * scale


def from_latents(latents: Tensor, convention: str, scaling_factor: float, shift_factor: float | None = None) -> Tensor:
    """The inverse of to_latents."""
    scale, shift = scale_and_shift(convention, scaling_factor, shift_factor)
    return latents / scale + shift if shift else latents / scale


def scale_and_shift(convention: str, scaling_factor: float, shift_factor: float | None = None) -> tuple[float, float]:
    """(scale, shift) such that latents = (z - shift) * scale. ValueError for an unknown name or a missing shift_factor."""
    check_convention(convention)
    if convention == "openvision3":
        return float(scaling_factor), 0.0
    if shift_factor is None:
        raise ValueError('latent_convention: "flux" needs a VAE with a shift_factor, and this one has none')
    return float(scaling_factor), float(shift_factor)


def check_convention(name: str, expected: str | None = None, what: str = "latent_convention") -> str:
    """The name, if it is known and the `expected` one. ValueError otherwise."""
    if name not in CONVENTIONS:
        raise ValueError(f"{what}: must be one of {', '.join(CONVENTIONS)}; got {name!r}")
    if expected is not None and name != expected:
        raise ValueError(
            f"{what}: {name!r} can't be mixed with {expected!r}, which this model or VAE uses; they differ by a shift"
        )
    return name


class FrozenVAE(nn.Module):
    """Images <-> latents with frozen weights: always in eval mode, in its weights' dtype whatever autocast says.

    vae: an Autoencoder, or diffusers' AutoencoderKL, whose GroupNorm and SiLU are then fused in place. On a GPU it computes in channels-last, and
    its decoder's upsampling is folded into the convolutions behind.
    latent_convention binds it to one convention (a model that it is attached to does so); None leaves the choice to each call.
    """

    def __init__(self, vae: nn.Module, latent_convention: str | None = None) -> None:
        super().__init__()
        self.vae: Any = vae.requires_grad_(False).eval()
        fuse_group_norm_silu(self.vae)
        fold_upsampling(self.vae)
        self._channels_last = False
        self.latent_convention = None if latent_convention is None else check_convention(latent_convention)
        config: Any = vae.config
        self.scaling_factor: float = config.scaling_factor
        self.shift_factor: float | None = config.shift_factor
        self.channels: int = config.latent_channels
        self.stride: int = 2 ** (len(config.block_out_channels) - 1)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        subfolder: str | None = None,
        *,
        latent_convention: str | None = None,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        hub: pretrained.Hub | None = None,
    ) -> FrozenVAE:
        """A folder or hub id in diffusers' layout, "small" for the one in the package, or "pixels" for none (models.pixels).

        subfolder: where it lies within; None takes the folder itself or its "vae" (FLUX.1-dev's layout). variant, hub: which file, and
        how a hub id is looked up. FileNotFoundError or ValueError, in one line, where there is no such VAE.
        """
        if str(path) == PIXELS:
            return cls(PixelAutoencoder(dtype), latent_convention)
        if str(path) == SMALL:
            root = small_vae_folder()
            if not root.exists():
                raise FileNotFoundError(
                    f"VAE: the package's small VAE is missing ({root}); reinstall ov3fast or name another VAE by folder or hub id"
                )
        else:
            files = ("config.json", "diffusion_pytorch_model*")
            places = [f"{subfolder}/"] if subfolder else ["", "vae/"]
            root = pretrained.resolve(path, "VAE", [place + file for place in places for file in files], hub)
        choices = [root / subfolder] if subfolder else [root, root / "vae"]
        folder = next((choice for choice in choices if (choice / "config.json").is_file()), None)
        if folder is None:
            raise FileNotFoundError(f"VAE: {choices[0]} has no config.json; give the folder of a diffusers AutoencoderKL")
        return cls(_load(folder, dtype, variant), latent_convention)

    @classmethod
    def from_config(cls, config: dict[str, Any], *, latent_convention: str | None = None) -> FrozenVAE:
        """Random weights in the given architecture (FLUX_VAE, say), for shapes and counts."""
        if autoencoder.supports(config):
            return cls(Autoencoder(AutoencoderConfig.from_json(config)), latent_convention)
        return cls(_autoencoder_kl().from_config(dict(config)), latent_convention)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> [B, 2C, H / stride, W / stride]: the posterior's mean and log-variance.

        Callers clamp the log-variance to [-30, 20], as diffusers does (ops.patch_embed and from_moments).
        """
        if not images.is_floating_point():
            raise TypeError(f"VAE: images must be floating point in [-1, 1], got {images.dtype}; use images / 127.5 - 1")
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise ValueError(
                f"VAE: images must be [B, 3, H, W] with sides that are multiples of {self.stride}, got {tuple(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            moments: Tensor = self.vae.encode(self._laid_out(images.to(self.dtype))).latent_dist.parameters
        return moments

    def encode(
        self, images: Tensor, posterior: str = "mean", convention: str | None = None, rng: Tensor | None = None
    ) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] in the convention; no gradient.

        posterior "sample" draws with rng, element by element of the contiguous tensor (as ops.patch_embed does from moments).
        """
        return self.from_moments(self.moments(images), posterior, convention, rng)

    def from_moments(
        self, moments: Tensor, posterior: str = "mean", convention: str | None = None, rng: Tensor | None = None
    ) -> Tensor:
        """moments [B, 2C, h, w] -> latents [B, C, h, w], for what needs the latents themselves; ops.patch_embed takes moments."""
        mean, logvar = moments.chunk(2, dim=1)
        if posterior == "sample":
            if rng is None:
                raise ValueError('VAE: posterior="sample" needs rng, the (seed, offset) tensor that it is drawn from')
            mean = mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise.normal(mean.shape, rng, mean.dtype)
        elif posterior != "mean":
            raise ValueError(f"VAE: posterior must be 'mean' or 'sample', got {posterior!r}")
        return to_latents(mean, self.convention(convention), self.scaling_factor, self.shift_factor)

    def decode(self, latents: Tensor, convention: str | None = None) -> Tensor:
        """latents [B, C, h, w] -> images [B, 3, H, W], about [-1, 1]; differentiable with respect to the latents."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"VAE: latents must be [B, {self.channels}, h, w], got {tuple(latents.shape)}")
        z = from_latents(latents.to(self.dtype), self.convention(convention), self.scaling_factor, self.shift_factor)
        with torch.autocast(latents.device.type, enabled=False):
            images: Tensor = self.vae.decode(self._laid_out(z)).sample
        return images

    def _laid_out(self, x: Tensor) -> Tensor:
        """On a GPU x and the weights in channels-last, as the fastest convolutions and the GroupNorm's kernels read them."""
        if not x.is_cuda:
            return x
        if not self._channels_last:
            self.vae.to(memory_format=torch.channels_last)
            self._channels_last = True
        return x.contiguous(memory_format=torch.channels_last)

    def convention(self, name: str | None = None) -> str:
        """The convention of a call: the bound one (ValueError where `name` differs), else `name`, else "openvision3"."""
        if self.latent_convention is None:
            return check_convention(name or "openvision3")
        return check_convention(name or self.latent_convention, self.latent_convention)

    def scale_and_shift(self, convention: str | None = None) -> tuple[float, float]:
        """(scale, shift) such that latents = (z - shift) * scale in the convention."""
        return scale_and_shift(self.convention(convention), self.scaling_factor, self.shift_factor)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> FrozenVAE:
        """Stays in eval mode: it is frozen."""
        return super().train(False)


def small_vae_folder() -> Path:
    """Where the package keeps its small VAE."""
    return Path(str(resources.files("ov3fast"))) / "assets" / "small_vae"


def _load(folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """An Autoencoder, or diffusers' AutoencoderKL for a layout that Autoencoder doesn't have."""
    config = pretrained.read_json(folder / autoencoder.CONFIG_FILE, "VAE")
    try:
        if autoencoder.supports(config):
            return Autoencoder.from_pretrained(folder, dtype, variant)
        return _autoencoder_kl().from_pretrained(str(folder), torch_dtype=dtype, variant=variant, low_cpu_mem_usage=False)
    except ImportError:
        raise
    except Exception as error:  # a config with wrong types; diffusers and safetensors raise many kinds
        raise ValueError(f"VAE: can't load {folder}: {str(error).strip().splitlines()[0]}") from error


def _autoencoder_kl() -> Any:
    """diffusers' AutoencoderKL. ModuleNotFoundError that names the extra where diffusers is missing."""
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ModuleNotFoundError(
            "VAE: one of this layout is loaded by diffusers, which is not installed: pip install 'ov3fast[diffusers]'",
            name="diffusers",
        ) from None
    return AutoencoderKL
