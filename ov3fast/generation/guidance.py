"""Guidance: push a denoiser's velocity away from that of a worse one.

    v = v_worse + w (v_better - v_worse)      for t within an interval, else v_better; w = 1 means no guidance

The worse one is, for classifier-free guidance (Ho and Salimans 2022), the same network without the condition; for AutoGuidance
(Karras et al. 2024), a smaller or less trained network with it; for internal guidance (RAEv2), a head on an earlier block, in
the same pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ov3fast.generation.flow import Denoiser


def extrapolate(better: Tensor, worse: Tensor, weight: float, t: Tensor, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """The formula above for velocities [B, ...] at t [B]; the interval is closed at both ends."""
    low, high = interval
    inside = ((t >= low) & (t <= high)).view(-1, *[1] * (better.ndim - 1))
    return torch.where(inside, worse + weight * (better - worse), better)


def classifier_free(
    conditional: Denoiser, unconditional: Denoiser, weight: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Denoiser:
    """Two passes per step, with and without the condition. ValueError for a bad interval."""
    return _guided(lambda x, t: (conditional(x, t), unconditional(x, t)), weight, interval)


def autoguidance(good: Denoiser, bad: Denoiser, weight: float, interval: tuple[float, float] = (0.0, 1.0)) -> Denoiser:
    """Two passes per step: a good and a bad network, with the same condition. ValueError for a bad interval."""
    return _guided(lambda x, t: (good(x, t), bad(x, t)), weight, interval)


def internal(
    heads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], weight: float = 1.78, interval: tuple[float, float] = (0.1, 1.0)
) -> Denoiser:
    """One pass per step; `heads` gives the full and base heads' velocities. RAEv2's defaults. ValueError for a bad interval."""
    return _guided(heads, weight, interval)


def _guided(pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], weight: float, interval: tuple[float, float]) -> Denoiser:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance: interval must be 0 <= low <= high <= 1, got {interval}")

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        better, worse = pair(x, t)
        return extrapolate(better, worse, weight, t, interval)

    return denoiser
