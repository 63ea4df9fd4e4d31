"""Greedy and beam search over any step function.

`step(place, ids, rows)` gives the log-probabilities [B * K, V] of the id at place + 1, where ids [B * K] stand at `place` and rows
[B * K] say which former row each row continues (a model with a cache reorders it by them; at place 0 they are 0, 1, 2, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[int, Tensor, Tensor], Tensor]


def search(
    step: Step,
    batch: int,
    beams: int,
    length: int,
    *,
    bos: int,
    eos: int,
    pad: int,
    length_penalty: float = 0.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The best sequences [batch, <= length] int64: [bos] first, padded behind [eos]; beams = 1 is greedy search.

    A beam's score is its summed log-probability over (ids after [bos]) ** length_penalty. A finished beam competes on with its
    score fixed. [bos] and padding are never chosen: no target teaches a model when to say them. ValueError for beams < 1.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    rows = torch.arange(batch * beams, device=device)
    first_row = torch.arange(batch, device=device)[:, None] * beams
    ids = torch.full((batch * beams, 1), bos, dtype=torch.int64, device=device)
    done = torch.zeros(batch * beams, dtype=torch.bool, device=device)
    counts = torch.zeros(batch, beams, device=device)
    # All beams of a row start out alike, so only the first may spread at the first step.
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0
    for place in range(length - 1):
        log_probs = step(place, ids[:, -1], rows).to(scores.dtype)
        vocabulary = log_probs.shape[-1]
        # A finished beam has one continuation, padding, that costs nothing; no other beam may pad.
        log_probs = log_probs.masked_fill(done[:, None], -torch.inf)
        log_probs[:, bos] = -torch.inf
        log_probs[:, pad] = torch.where(done, 0.0, -torch.inf)
        totals = scores[:, :, None] + log_probs.view(batch, beams, vocabulary)
        lengths = (counts + (~done).view(batch, beams)).clamp(min=1)
        ranked = totals / lengths[:, :, None] ** length_penalty
        best = ranked.view(batch, -1).topk(beams, dim=1).indices
        beam, chosen = best // vocabulary, best % vocabulary
        scores = totals.view(batch, -1).gather(1, best)
        counts = lengths.gather(1, beam)
        rows = (first_row + beam).reshape(-1)
        done = done[rows]
        chosen = chosen.reshape(-1).masked_fill(done, pad)
        ids = torch.cat([ids[rows], chosen[:, None]], dim=1)
        done = done | (chosen == eos)
        # Sums only fall, so without a penalty a finished best beam (topk sorts) stays the best.
        settled = done.view(batch, beams)[:, 0] if length_penalty == 0 else done
        if bool(settled.all()):
            break
    winner = (scores / counts.clamp(min=1) ** length_penalty).argmax(dim=1)
    return ids.view(batch, beams, -1)[torch.arange(batch, device=device), winner]
