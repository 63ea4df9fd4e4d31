"""Batches of conversations: one per row, padded, or several, packed, with separate positions and no attention between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ov3fast.data.order import permute
from ov3fast.understanding.conversations import IGNORED, Example

OPEN_ROWS = 64
"""Open rows that packing searches for space."""


class Batch(NamedTuple):
    """ids, labels, positions: int64 [B, L]; mask: bool [B, L], or [B, 1, L, L] if packed; images: in the order of their ids."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor
    images: list[str]

    @property
    def answers(self) -> int:
        """Number of positions that contribute to the loss."""
        return int((self.labels != IGNORED).sum())


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Example indices of each row: each example goes into the first open row with room (first fit, in the given order)."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []
    for number, length in enumerate(lengths):
        place = next((i for i, (room, _) in enumerate(open_rows) if room >= length), None)
        if place is None:
            if len(open_rows) == OPEN_ROWS:
                open_rows.pop(min(range(OPEN_ROWS), key=lambda i: open_rows[i][0]))
            rows.append([])
            open_rows.append((max_length, rows[-1]))
            place = len(open_rows) - 1
        room, row = open_rows[place]
        row.append(number)
        open_rows[place] = (room - length, row)
    return rows


def rows_of_epoch(
    lengths: Sequence[int], epoch: int, *, seed: int, stage: int, packed: bool, max_length: int
) -> list[list[int]]:
    """The rows of an epoch, in order, as example indices; depends only on the arguments."""
    order = permute(np.arange(len(lengths)), len(lengths), seed, stage, epoch).tolist()
    if not packed:
        return [[number] for number in order]
    return [[order[place] for place in row] for row in pack([lengths[number] for number in order], max_length)]


def collate(rows: Sequence[Sequence[Example]], pad_id: int = 0) -> Batch:
    """Examples -> a batch padded to its longest row."""
    count, length = len(rows), max(sum(len(one.ids) for one in row) for row in rows)
    ids = torch.full((count, length), pad_id)
    labels = torch.full((count, length), IGNORED)
    positions = torch.zeros(count, length, dtype=torch.int64)
    segment = torch.zeros(count, length, dtype=torch.int64)  # 0 is padding
    images = []
    for place, row in enumerate(rows):
        at = 0
        for number, one in enumerate(row, 1):
            here = slice(at, at + len(one.ids))
            ids[place, here], labels[place, here] = torch.tensor(one.ids), torch.tensor(one.labels)
            positions[place, here], segment[place, here] = torch.arange(len(one.ids)), number
            at += len(one.ids)
            if one.image is not None:
                images.append(one.image)
    mask = segment > 0
    if any(len(row) > 1 for row in rows):
        same = segment[:, None, :, None] == segment[:, None, None, :]
        mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(ids, labels, positions, mask, images)
