"""Every random draw of the models, as a function of rng = (seed, offset): the same rng gives the same values on any device.

One rng serves a whole forward pass. The decoder's noise is drawn from it as it is; the other draws use streams of their own, with the
seed mixed with a constant, so that none repeats another's numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ov3fast import ops

# Arbitrary odd constants, one per purpose.
SIGMA = 0x2545F4914F6CDD1D
KEEP = 0x1B873593CC9E2D51
POSTERIOR = 0x165667B19E3779F9


def derive_rng(rng: Tensor, purpose: int) -> Tensor:
    """rng with its seed mixed with a constant: an independent stream for another purpose."""
    return torch.stack([rng[0] ^ purpose, rng[1]])


def normal(shape: tuple[int, ...], rng: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values on rng's device."""
    return ops.random.normal(tuple(shape), rng, dtype)


def sample_sigma(batch: int, tau: float, rng: Tensor) -> Tensor:
    """sigma [batch] float32 ~ U[0, tau], one per instance (paper eq. 3), from a stream that serves nothing else."""
    return tau * ops.random.uniform((batch,), rng)


def keep_tokens(tokens: Tensor, keep: float, rng: Tensor) -> Tensor:
    """tokens [B, N, D] -> [B, int(N * keep), D]: a random choice of places per instance, in their order (at least one)."""
    batch, length, _ = tokens.shape
    kept = max(1, int(length * keep))
    scores = ops.random.uniform((batch, length), derive_rng(rng, KEEP))
    places = scores.topk(kept, dim=1).indices.sort(dim=1).values.to(tokens.device)
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))
