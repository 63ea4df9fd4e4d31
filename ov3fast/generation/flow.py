"""Flow matching between data (t = 0) and noise (t = 1), trained and sampled as in RAE.

    x_t = (1 - t) x + t eps,   v = eps - x                                             (RAE src/stage2/transport)
    t <- s t / (1 + (s - 1) t),   s = sqrt(C H W / 4096)                               time shift for wide latents
    v_hat = (x_t - x_hat) / max(t, 0.05)                                               x-prediction (RAEv2)

A *denoiser* is a callable (x_t [B,C,H,W], t [B]) -> velocity [B,C,H,W]. Legend: B batch, C channels, H, W grid size, S steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
SMALLEST_T = 0.05
"""Lower bound on t when a prediction of x is converted to a velocity."""
LAST_T = 0.999
"""Before the shift, training times lie in [0, LAST_T], and a velocity network's sampling grid ends at 1 - LAST_T (RAE)."""


def time_shift(shape: Sequence[int]) -> float:
    """s for latents [C, H, W]: 6.928 for 768 x 16 x 16, 8 for 1024 x 16 x 16."""
    channels, height, width = shape
    return (channels * height * width / 4096) ** 0.5


def shift(t: Tensor, s: float) -> Tensor:
    """t in [0, 1] -> s t / (1 + (s - 1) t): keeps 0 and 1; s > 1 moves the rest towards noise."""
    return s * t / (1 + (s - 1) * t)


def draw_times(normal: Tensor, s: float, *, logit_normal: bool = True) -> Tensor:
    """Shifted training times from standard normal values [B]: logit-normal (their sigmoid), or else uniform (their CDF)."""
    t = torch.sigmoid(normal) if logit_normal else torch.special.ndtr(normal)
    return shift(t.clamp(max=LAST_T), s)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for x, noise [B, ...] and t [B]."""
    t = _like(t, x)
    return (1 - t) * x + t * noise


def velocity_of(x_t: Tensor, x_hat: Tensor, t: Tensor) -> Tensor:
    """Convert a prediction of x to a velocity, with t clamped to at least SMALLEST_T."""
    return (x_t - x_hat) / _like(t, x_t).clamp(min=SMALLEST_T)


def velocity_loss(v_hat: Tensor, x: Tensor, noise: Tensor, t: Tensor, *, clamped: bool = False) -> Tensor:
    """MSE of v_hat against v, a float32 scalar. clamped: against the x-prediction target, (x_t - x) / max(t, SMALLEST_T)."""
    target = velocity_of(interpolate(x, noise, t), x, t) if clamped else noise - x
    return (v_hat.float() - target.float()).square().mean()


def sampling_times(steps: int, s: float, *, to_zero: bool = True) -> Tensor:
    """The S + 1 shifted times of an S-step sampler, float64, descending from 1. ValueError if steps < 1.

    to_zero: linspace(1, 0, S + 1) before the shift, as in RAEv2; otherwise RAE's grid for velocity networks, ending at
    shift(1 - LAST_T).
    """
    if steps < 1:
        raise ValueError(f"sampling_times: steps must be at least 1, got {steps}")
    end = 0.0 if to_zero else 1 - LAST_T
    return shift(torch.linspace(1.0, end, steps + 1, dtype=torch.float64), s)


def sample(denoiser: Denoiser, noise: Tensor, times: Tensor, method: str = "euler") -> Tensor:
    """Integrate dx/dt = v from noise [B,C,H,W] at times[0] to times[-1].

    method: "euler" (one call per step) or "heun" (second order, two calls per step, but one in a final step to t = 0, where the
    velocity of an x-prediction is clamped). The state is float32. Samples are independent of the batch if the denoiser is.
    ValueError for any other method.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"sample: method must be 'euler' or 'heun', got {method!r}")
    x = noise.float()
    grid = times.tolist()
    for now, then in zip(grid, grid[1:], strict=False):
        step, t = then - now, x.new_full((len(x),), now)
        v = denoiser(x, t).float()
        if method == "heun" and then > 0:
            v = (v + denoiser(x + step * v, x.new_full((len(x),), then)).float()) / 2
        x = x + step * v
    return x


def generator_of(words: str) -> torch.Generator:
    """A random generator seeded with a hash of `words`."""
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise_of(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [len(indices), *shape]; row i depends only on (seed, indices[i])."""
    rows = []
    for index in indices:
        generator = generator_of(f"{seed}/{index}")
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows) if rows else torch.empty((0, *shape))


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
