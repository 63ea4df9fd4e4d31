"""A loss or gradient that is not finite, and a loss that is a spike: found before the update, reported with the samples.

What follows is recipe.on_spike: the run ends (abort); the step goes without its update (skip); or the run goes back to the last checkpoint
and leaves the samples since then out (rollback).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast.io import atomic_write
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.training.distributed import ALONE, Ranks
from ov3fast.training.step import MicroBatch

SUMS = ("rec", "und", "loss", "gradient norm")
NAMED = 5
WINDOW, LEAST = 64, 16
"""Losses over which a spike's median is taken, and the fewest that it takes."""
MOST = 10
"""Steps that a run may skip or roll back before it ends anyway."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite. The weights are those of the step before."""


class SpikeError(RuntimeError):
    """A loss is far above those before it. The weights are those of the step before."""


def median_if_spike(recent: list[float], loss: float, factor: float) -> float | None:
    """The median of the recent losses if this one is more than `factor` times as large; else None, and the loss joins them."""
    if len(recent) >= LEAST and loss > factor * (median := statistics.median(recent)):
        return median
    recent.append(loss)
    del recent[:-WINDOW]
    return None


def report(
    run_dir: Path, ranks: Ranks, stage: str, step: int, model: OpenVision3, micro_batches: Sequence[MicroBatch], values: Mapping[str, Tensor],
    autocast: Any, median: float | None = None,
) -> str:  # fmt: skip
    """Writes run_dir/non-finite-step-<step>-rank-<rank>.json, or spike-step-..., and returns what it says in one line.

    values: losses by name. median: of a spike, what its loss was held against. Every rank takes part.
    """
    wrong = [name for name, value in values.items() if not bool(torch.isfinite(value))]
    terms = [name for name in wrong if name not in SUMS] or wrong
    suspects: list[str] = []
    if median is None:
        with autocast:
            suspects = [key for micro_batch in micro_batches for key in suspicious(model, micro_batch, ranks)]
    keys = [key for micro_batch in micro_batches for key in micro_batch.keys]
    record = {
        "step": step,
        "stage": stage,
        "terms": terms if median is None else ["loss"],
        "values": {name: str(float(value)) for name, value in values.items()},
        "median": median,
        "suspects": suspects,
        "samples": keys,
    }
    path = run_dir / f"{'non-finite' if median is None else 'spike'}-step-{step:08d}-rank-{ranks.rank}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if median is not None:
        what = f"loss {float(values['loss']):.4g} is a spike, the median of the last ones is {median:.4g}"
    else:
        what = f"{', '.join(terms)} is not finite" if terms else "a loss of another process is not finite"
    shown = suspects or keys
    names = ", ".join(shown[:NAMED]) + (f" and {len(shown) - NAMED} more" if len(shown) > NAMED else "")
    which = f"samples at fault: {names}" if suspects else f"in the batch of {names}"
    return (
        f"step {step} of stage {stage}: {what}; {which}; no weight was changed; all keys are in {path}; "
        f"`ov3fast replay {run_dir} {step + 1}` computes it again"
    )


@torch.no_grad()
def suspicious(model: OpenVision3, micro_batch: MicroBatch, ranks: Ranks = ALONE) -> list[str]:
    """Keys of the images whose latents, or whose outputs of the model, are not finite."""
    bad = ~micro_batch.latents.isfinite().flatten(1).all(1)
    # A sharded model runs on all ranks or on none.
    (runs,) = ranks.largest(not bool(bad.any()))
    if runs:
        output = model(
            micro_batch.latents, micro_batch.text_ids, micro_batch.caption_ids, sigma=micro_batch.sigma, rng=micro_batch.rng, decode_index=micro_batch.latent_rows,
            caption_index=micro_batch.caption_rows, text_index=micro_batch.text_index,
        )  # fmt: skip
    if not bad.any():
        for value in (output.tokens, output.pooled):
            bad = bad | ~value.isfinite().flatten(1).all(1)
        reconstructed = slice(None) if micro_batch.latent_rows is None else micro_batch.latent_rows
        bad[reconstructed] |= ~output.latents_hat.isfinite().flatten(1).all(1)
        if output.caption_hidden is not None:
            bad[micro_batch.caption_rows[~output.caption_hidden.isfinite().flatten(1).all(1)]] = True
    return [key for key, is_bad in zip(micro_batch.keys, bad.tolist(), strict=True) if is_bad]
