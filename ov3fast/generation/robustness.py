"""How a tokenizer's decoders bear noise on their tokens: a generator's tokens are never quite right.

For sigma in SIGMAS: z + sigma eps -> ViT decoder -> VAE decoder; PSNR against the pictures themselves, Frechet distance against a
reference. Two decoders of equal quality at sigma = 0 can differ widely at 0.4, and the better one there generates better.
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
    """Of one sigma: mean PSNR in dB, FID-style, and the decoded pictures uint8 [N, 3, H, W]."""

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
    """images: uint8 [N, 3, H, W]; features: of such pictures, [N, D]; reference: moments of real pictures' features."""
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
    """Images [B, 3, H, W] about [-1, 1] -> uint8 on the CPU, floor(255 x) of [0, 1], as RAE writes images."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).floor().to(torch.uint8).cpu()
