"""The speed-up of the chosen kernels: whole steps of a run, timed with them and with another backend, in turn.

The steps are real ones (gradients, clipping, update, EMA) on the run's first batch; afterwards weights, moments and average are put back,
so a run with a comparison computes the same bits as one without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from torch import nn

from ov3fast import ops
from ov3fast.training.optimizer import AdamW, copy


def compare(
    update: Callable[[], None], model: nn.Module, optimizer: AdamW, images: int, other: str, rounds: int
) -> dict[str, float | str]:
    """Images per second of `update` as it is and with ops.use(other): medians over `rounds` turns, after one that is not counted.

    update: one whole optimizer step of `images` images. Returns images_per_s, other (its name), other_images_per_s and ratio.
    """
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {name: value.clone() for name, value in optimizer.moments().items()}
    ema = None if optimizer.ema is None else {name: value.clone() for name, value in optimizer.ema.items()}
    steps = optimizer.steps
    seconds: dict[str, list[float]] = {"": [], other: []}
    try:
        for turn in range(rounds + 1):
            for name in ("", other):
                began = time.perf_counter()
                if name:
                    with ops.use(name):
                        update()
                else:
                    update()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    finally:
        copy(model.state_dict(), weights, "model")
        optimizer.load(moments, ema, steps)
        optimizer.zero_grad()
    ours, theirs = (images / statistics.median(seconds[name]) for name in ("", other))
    return {"images_per_s": ours, "other": other, "other_images_per_s": theirs, "ratio": ours / theirs, "rounds": rounds}


def describe(result: dict[str, float | str]) -> str:
    return (
        f"whole steps, in turn: {result['images_per_s']:.1f} images/s with the chosen kernels, "
        f"{result['other_images_per_s']:.1f} with impl={result['other']!r}: {result['ratio']:.2f} x"
    )
