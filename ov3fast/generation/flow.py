"""Flow matching between data (t = 0) and noise (t = 1), as RAE trains and samples it.

    x_t = (1 - t) x + t eps,   v = eps - x                                             (RAE src/stage2/transport)
    t <- s t / (1 + (s - 1) t),   s = sqrt(C H W / 4096)                               the shift for wide latents
    v_hat = (x_t - x_hat) / max(t, 0.05)                                               a network that predicts x (RAEv2)

A *denoiser* is a callable (x_t [B,C,H,W], t [B]) -> velocity [B,C,H,W]. Legend: B batch, C channels, H, W places, S steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
SMALLEST_T = 0.05
"""Where a prediction of x is turned into a velocity, t is at least this."""
LAST_T = 0.999
"""Times of the velocity network's training lie in [0, LAST_T], and its sampling ends at 1 - LAST_T (RAE)."""


def time_shift(shape: Sequence[int]) -> float:
    """s for latents [C, H, W]: 6.928 for 768 x 16 x 16, 8 for 1024 x 16 x 16."""
    channels, height, width = shape
    return (channels * height * width / 4096) ** 0.5


def shift(t: Tensor, s: float) -> Tensor:
    """t in [0, 1] -> s t / (1 + (s - 1) t): the ends stay, s > 1 moves the rest towards noise."""
    return s * t / (1 + (s - 1) * t)


def draw_times(normal: Tensor, s: float, *, logit_normal: bool = True) -> Tensor:
    """Training times from standard normal values [B]: sigmoid of them (else uniform, by their distribution function), shifted."""
    t = torch.sigmoid(normal) if logit_normal else torch.special.ndtr(normal)
    return shift(t.clamp(max=LAST_T), s)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for x, noise [B, ...] and t [B]."""
    t = _like(t, x)
    return (1 - t) * x + t * noise


def velocity_of(x_t: Tensor, x_hat: Tensor, t: Tensor) -> Tensor:
    """The velocity that a prediction of x stands for; t is at least SMALLEST_T."""
    return (x_t - x_hat) / _like(t, x_t).clamp(min=SMALLEST_T)


def velocity_loss(v_hat: Tensor, x: Tensor, noise: Tensor, t: Tensor, *, clamped: bool = False) -> Tensor:
    """Mean square of v_hat - v, a scalar in float32. clamped: the target of an x-prediction, (x_t - x) / max(t, SMALLEST_T)."""
    target = velocity_of(interpolate(x, noise, t), x, t) if clamped else noise - x
    return (v_hat.float() - target.float()).square().mean()


def sampling_times(steps: int, s: float, *, to_zero: bool = True) -> Tensor:
    """The S + 1 shifted times of a sampler with S steps, float64, from 1 down.

    to_zero: linspace(1, 0, S + 1), as RAEv2. Without, RAE's grid of a velocity network, which ends at shift(1 - LAST_T).
    """
    if steps < 1:
        raise ValueError(f"sampling_times: steps must be at least 1, got {steps}")
    end = 0.0 if to_zero else 1 - LAST_T
    return shift(torch.linspace(1.0, end, steps + 1, dtype=torch.float64), s)


def sample(denoiser: Denoiser, noise: Tensor, times: Tensor, method: str = "euler") -> Tensor:
    """Integrates dx/dt = v from noise [B,C,H,W] at times[0] to times[-1].

    method: "euler" (one call a step) or "heun" (second order, two calls a step but one in a last step to t = 0, where
    an x-prediction's velocity is clamped). The state is float32; rows never meet, so that a sample does not depend on its batch where
    the denoiser's doesn't. ValueError for another method.
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
    """A generator whose draws are a function of the words alone."""
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise_of(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [len(indices), *shape]: row i is a function of (seed, indices[i]) alone."""
    rows = []
    for index in indices:
        generator = generator_of(f"{seed}/{index}")
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows) if rows else torch.empty((0, *shape))


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
