"""A loss or gradient that is not finite ends the run before the update, and says which term and which samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ov3fast.io import atomic_write
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.training.step import MicroBatch

SUMS = ("rec", "und", "loss", "gradient norm")
NAMED = 5


class NonFiniteError(RuntimeError):
    """A loss is NaN or infinite. The weights are those of the step before."""


def stop_non_finite(
    run_dir: Path, rank: int, stage: str, step: int, model: OpenVision3, micro_batches: Sequence[MicroBatch], values: Mapping[str, Tensor],
    autocast: Any,
) -> NoReturn:  # fmt: skip
    """Writes run_dir/non-finite-step-<step>-rank-<rank>.json and raises NonFiniteError in one line. values: losses by name."""
    wrong = [name for name, value in values.items() if not bool(torch.isfinite(value))]
    terms = [name for name in wrong if name not in SUMS] or wrong
    with autocast:
        suspects = [key for micro_batch in micro_batches for key in suspicious(model, micro_batch)]
    keys = [key for micro_batch in micro_batches for key in micro_batch.keys]
    record = {
        "step": step,
        "stage": stage,
        "terms": terms,
        "values": {name: str(float(value)) for name, value in values.items()},
        "suspects": suspects,
        "samples": keys,
    }
    path = run_dir / f"non-finite-step-{step:08d}-rank-{rank}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    what = f"{', '.join(terms)} is not finite" if terms else "a loss of another process is not finite"
    shown = suspects or keys
    names = ", ".join(shown[:NAMED]) + (f" and {len(shown) - NAMED} more" if len(shown) > NAMED else "")
    which = f"samples at fault: {names}" if suspects else f"in the batch of {names}"
    raise NonFiniteError(f"step {step} of stage {stage}: {what}; {which}; no weight was changed; all keys are in {path}")


@torch.no_grad()
def suspicious(model: OpenVision3, micro_batch: MicroBatch) -> list[str]:
    """Keys of the images whose latents, or whose outputs of the model, are not finite."""
    bad = ~micro_batch.latents.isfinite().flatten(1).all(1)
    if not bad.any():
        output = model(
            micro_batch.latents, micro_batch.text_ids, micro_batch.caption_ids, sigma=micro_batch.sigma, rng=micro_batch.rng, decode_index=micro_batch.latent_rows,
            caption_index=micro_batch.caption_rows, text_index=micro_batch.text_index,
        )  # fmt: skip
        for value in (output.tokens, output.pooled):
            bad = bad | ~value.isfinite().flatten(1).all(1)
        reconstructed = slice(None) if micro_batch.latent_rows is None else micro_batch.latent_rows
        bad[reconstructed] |= ~output.latents_hat.isfinite().flatten(1).all(1)
        if output.caption_hidden is not None:
            bad[micro_batch.caption_rows[~output.caption_hidden.isfinite().flatten(1).all(1)]] = True
    return [key for key, is_bad in zip(micro_batch.keys, bad.tolist(), strict=True) if is_bad]
