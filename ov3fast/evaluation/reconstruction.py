"""Reconstruction compared with the VAE alone, which separates the error of encoder and decoder from that of the VAE.

model   x -> VAE encoder -> latents -> ViT encoder -> tokens -> ViT decoder -> latents^ -> VAE decoder -> x^     (no noise)
vae     x -> VAE encoder -> latents -> VAE decoder -> x^
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ov3fast.evaluation.metrics import Metric, standard_metrics, to_unit

BY = ("model", "vae")


@dataclass(frozen=True)
class Reconstruction:
    """The reconstructions of a set of pictures; all images uint8 [N, 3, H, W].

    values: {"model" | "vae": {metric name: float64 [N]}}; with "model" also "latent_l1", the mean |latents - latents^|.
    """

    originals: Tensor
    model: Tensor
    vae: Tensor
    values: dict[str, dict[str, Tensor]]
    protocols: dict[str, str]

    def table(self, keys: Sequence[str] | None = None) -> dict[str, Any]:
        """JSON-able: mean, median, lowest and highest of each metric and, with `keys`, the values of each image.

        An infinite value (the PSNR of equal images) is null there.
        """
        table: dict[str, Any] = {by: {name: _summary(values) for name, values in of.items()} for by, of in self.values.items()}
        table["count"] = len(self.originals)
        if keys is not None:
            table["images"] = [
                {"key": key, **{by: {name: _finite(v[i].item()) for name, v in of.items()} for by, of in self.values.items()}}
                for i, key in enumerate(keys)
            ]
        return table


@torch.inference_mode()
def reconstruct(model: Any, images: Tensor, metrics: Sequence[Metric] | None = None, batch_size: int = 64) -> Reconstruction:
    """Reconstructs uint8 images [N, 3, H, W] with the model and with its VAE alone, and measures both per image.

    model: an OpenVision3 with a VAE, in eval mode. H and W: multiples of the VAE's stride times the patch. metrics: default PSNR and SSIM.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(
            f"reconstruct: images must be uint8 [N, 3, H, W] with N of at least 1, got {images.dtype} {tuple(images.shape)}"
        )
    metrics = standard_metrics() if metrics is None else tuple(metrics)
    names = [metric.name for metric in metrics]
    pictures: dict[str, list[Tensor]] = {by: [] for by in BY}
    values: dict[str, dict[str, list[Tensor]]] = {
        "model": {n: [] for n in (*names, "latent_l1")},
        "vae": {n: [] for n in names},
    }
    for start in range(0, len(images), batch_size):
        originals = to_model_range(images[start : start + batch_size]).to(model.device)
        latents, latents_hat = latent_pair(model, originals)
        values["model"]["latent_l1"].append((latents_hat - latents).abs().double().mean(dim=(1, 2, 3)).cpu())
        reference = to_unit(originals)
        for by, found in (("model", latents_hat), ("vae", latents)):
            decoded = to_unit(model.decode_latents(found))
            pictures[by].append((decoded * 255).round().to(torch.uint8).cpu())
            for metric in metrics:
                values[by][metric.name].append(metric(decoded, reference).cpu())
    return Reconstruction(
        images,
        torch.cat(pictures["model"]),
        torch.cat(pictures["vae"]),
        {by: {name: torch.cat(parts) for name, parts in of.items()} for by, of in values.items()},
        {metric.name: metric.protocol for metric in metrics},
    )


def latent_pair(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] -> (their latents, the decoder's latents), float32, without noise."""
    moments = model.encode_to_moments(images)
    latents = model.get_vae().from_moments(moments)
    _, tokens = model.encode_moments(moments)
    patch = model.config.vision.patch_size
    return latents.float(), model.decode(tokens, (latents.shape[2] // patch, latents.shape[3] // patch)).float()


def to_model_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _summary(values: Tensor) -> dict[str, float | None]:
    return {
        "mean": _finite(values.mean().item()),
        "median": _finite(values.median().item()),
        "min": _finite(values.min().item()),
        "max": _finite(values.max().item()),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
