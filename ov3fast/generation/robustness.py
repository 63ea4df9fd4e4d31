"""Robustness of the decoders to noise on the tokens, since generated tokens are never exact.

For sigma in SIGMAS: z + sigma eps -> ViT decoder -> VAE decoder; PSNR against the original images, Frechet distance against a
reference. Two decoders equally good at sigma = 0 can differ widely at 0.4, and the better one at 0.4 generates better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ov3fast.evaluation.metrics import psnr
from ov3fast.evaluation.reconstruction import to_model_range
from ov3fast.generation.frechet import frechet_of
from ov3fast.generation.moments import FeatureMoments
from ov3fast.models.openvision3 import OpenVision3

SIGMAS = (0.0, 0.2, 0.4, 0.8)


class Robustness(NamedTuple):
    """Results for one sigma: mean PSNR in dB, FID-style distance, decoded images uint8 [N, 3, H, W]."""

    sigma: float
    psnr: float
    fid_style: float
    pictures: Tensor


@torch.inference_mode()
def robustness(
    model: OpenVision3,
    images: Tensor,
    features: Callable[[Tensor], Tensor],
    reference: FeatureMoments,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Robustness]:
    """images: uint8 [N, 3, H, W]; features: maps such images to [N, D]; reference: feature moments of real images."""
    tokens = torch.cat([model.encode(to_model_range(batch))[1] for batch in images.split(batch_size)])
    rows = []
    for sigma in SIGMAS:
        parts = []
        for number, batch in enumerate(tokens.split(batch_size)):
            rng = torch.tensor([seed + number, 0])
            parts.append(
                as_pictures(model.decode_latents(model.decode(batch, None, batch.new_full((len(batch),), sigma), rng)))
            )
        pictures = torch.cat(parts)
        quality = float(psnr(pictures / 255, images / 255).mean())
        rows.append(Robustness(sigma, quality, frechet_of(FeatureMoments.of(features(pictures)), reference), pictures))
    return rows


def as_pictures(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] clamped to [-1, 1] -> uint8 on the CPU: floor(255 x) for x scaled to [0, 1], as in RAE."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).floor().to(torch.uint8).cpu()
