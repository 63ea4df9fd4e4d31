"""Latents encoded once: every (sample, variant) of a stage, kept in memory and read by index.

With `data.variants` = V an image is only ever seen in V augmented versions, so the frozen VAE needs to see each of them once. Images
are encoded in chunks of fixed size from sample 0 on, whatever is asked for later, so that a resumed run has the same bits. With
several processes each encodes its share of the chunks and all get the whole.

Legend: n samples, V variants, C latent channels (twice as many where the posterior is sampled: mean and log-variance).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ov3fast.io import atomic_write
from ov3fast.training.distributed import Ranks

CHUNK = 64
"""Images per call of the encoder; part of the bits."""


class LatentCache:
    """values [n, V, C, h, w] float32 or bfloat16, on the CPU."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self, index: Tensor, variant: Tensor) -> Tensor:
        """index, variant int64 [m] -> [m, C, h, w] float32."""
        return self.values[index, variant].float()


def fill(
    usable: np.ndarray,
    samples: int,
    variants: int,
    pixels: Callable[[np.ndarray, np.ndarray], Tensor],
    encode: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    ranks: Ranks,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatentCache:
    """Encodes all variants of the samples `usable` (int64 numbers below `samples`); the others stay zero.

    pixels(index, variant) -> images [m, 3, H, W]; encode(images) -> [m, C, h, w]; progress(images done, of).
    """
    total = len(usable) * variants
    values: Tensor | None = None
    for start in range(0, total, CHUNK):
        progress(start, total)
        own = (start // CHUNK) % ranks.world == ranks.rank
        if not own and values is not None:
            continue
        places = np.arange(start, min(start + CHUNK, total))
        index, variant = usable[places // variants], places % variants
        latents = encode(pixels(index, variant).to(ranks.device)).cpu()
        if values is None:
            values = torch.zeros(samples, variants, *latents.shape[1:], dtype=dtype)
        if own:
            values[index, variant] = latents.to(dtype)
    progress(total, total)
    if values is None:
        raise ValueError("latent cache: there is no usable sample to encode")
    # One rank writes each element and it is zero on the others, so summing the bytes gathers them.
    ranks.total(values.view(torch.uint8))
    return LatentCache(values)


def load(path: Path, key: str) -> LatentCache | None:
    """The cache that `save` wrote under this key, or None; an unreadable file counts as missing, since it can be made again."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return LatentCache(file.get_tensor("latents"))
    except (SafetensorError, OSError):
        return None


def save(cache: LatentCache, path: Path, key: str) -> None:
    """Writes the cache atomically."""
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file({"latents": cache.values}, str(temporary), {"key": key})


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over a module's parameters and buffers, names and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
