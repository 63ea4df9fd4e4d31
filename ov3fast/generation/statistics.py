"""Exact per-element statistics of tokens as latents, stored with their provenance.

    z <- (z - mean) / sqrt(var + 1e-5)      mean, var [C, H, W] over the images; population variance (RAE, calculate_stat.py)

`ov3fast statistics MODEL IMAGES --out FILE` writes them. They are valid for one model, image size and preprocessing; readers
compare `about`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ov3fast.data.skips import DataError
from ov3fast.generation.moments import ElementMoments
from ov3fast.inference.decoding import Options, readable_batches
from ov3fast.inference.encode import find_sources, image_side
from ov3fast.inference.load import VisionTower
from ov3fast.io import atomic_write, check_writable
from ov3fast.models.openvision3 import OpenVision3

if TYPE_CHECKING:
    from ov3fast.data.preprocess import ImageLike

EPS = 1e-5
"""Added to the variance before the square root, as in RAE."""
DIFFUSERS_EPS = 1e-5
"""diffusers' AutoencoderRAE divides by latents_std + 1e-5 instead."""


@dataclass(frozen=True)
class LatentStatistics:
    """mean, var: float64 [C, H, W]. about: "images" (count), "image_size", "latents" (the VAE's convention), "preprocess"."""

    mean: Tensor
    var: Tensor
    about: dict[str, str]

    def normalize(self, z: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> approximately zero mean and unit variance, in z's dtype. ValueError for a wrong shape."""
        self._check(z)
        return ((z - self.mean.to(z)) / (self.var + EPS).sqrt().to(z)).to(z.dtype)

    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of normalize."""
        self._check(z)
        return (z * (self.var + EPS).sqrt().to(z) + self.mean.to(z)).to(z.dtype)

    def to_rae(self) -> dict[str, Tensor]:
        """{"mean", "var"} float32 [C, H, W]: the contents of RAE's normalization_stat_path file (write it with torch.save)."""
        return {"mean": self.mean.float(), "var": self.var.float()}

    def to_diffusers(self) -> dict[str, Tensor]:
        """{"latents_mean", "latents_std"} float32 for AutoencoderRAE, where dividing by latents_std + 1e-5 matches ours."""
        return {"latents_mean": self.mean.float(), "latents_std": ((self.var + EPS).sqrt() - DIFFUSERS_EPS).float()}

    def save(self, path: str | Path) -> Path:
        """Write a .safetensors file with `about` as metadata."""
        from safetensors.torch import save_file

        path = Path(path)
        with atomic_write(path) as temporary:
            save_file({"mean": self.mean, "var": self.var}, temporary, {"about": json.dumps(self.about)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> LatentStatistics:
        """Load what `save` wrote. FileNotFoundError; ValueError for any other kind of file."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"statistics: no file {path}")
        try:
            with safe_open(path, "pt") as file:
                return cls(file.get_tensor("mean"), file.get_tensor("var"), json.loads((file.metadata() or {})["about"]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"statistics: {path} is no file of `ov3fast statistics` ({error})") from None

    def _check(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1:] != self.mean.shape:
            raise ValueError(
                f"statistics: latents must have shape [B, {', '.join(map(str, self.mean.shape))}]; got {tuple(z.shape)}"
            )


def as_latents(tokens: Tensor) -> Tensor:
    """Tokens [B, N, C] of a square grid -> [B, C, H, W]. ValueError if N is not a square."""
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"as_latents: the number of tokens must be a square, got {tokens.shape[1]}")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def as_tokens(latents: Tensor) -> Tensor:
    """The inverse of as_latents."""
    return latents.flatten(2).transpose(1, 2)


@torch.inference_mode()
def token_statistics(
    model: OpenVision3 | VisionTower,
    images: ImageLike | Sequence[ImageLike],
    *,
    out: str | Path | None = None,
    **options: object,
) -> LatentStatistics:
    """Statistics of a model's tokens over images, written to `out` if given; images and options as for `ov3fast.encode`.

    Under torch.distributed, pass each rank its part of the images; the result covers all ranks. Unreadable images are skipped
    and counted in about["skipped"]. DataError if no image could be read.
    """
    if out is not None:
        check_writable(out)
    chosen = Options(**options)  # type: ignore[arg-type]
    size, moments = image_side(model, chosen, "statistics"), ElementMoments()
    skipped: list[str] = []
    for batch in readable_batches(find_sources(images), size, chosen, skipped):
        moments.add(as_latents(model.encode(batch)[1]))
    moments.all_reduce()
    if not moments.count:
        raise DataError(f"statistics: none of the images could be read ({len(skipped)} skipped)")
    about = {
        "images": str(moments.count),
        "skipped": str(len(skipped)),
        "image_size": str(size),
        "latents": model.encoder.latent_convention,
        "preprocess": f"white background, shorter side resized ({chosen.interpolation}, antialias), centre crop, [-1, 1]",
    }
    statistics = LatentStatistics(moments.mean, moments.var, about)
    if out is not None:
        statistics.save(out)
    return statistics
