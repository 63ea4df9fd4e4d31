"""Samples that can't be used: counted by name, warned about, and past a budget an error.

Reasons: broken_image, truncated_image, missing_image, too_large, missing_caption, broken_json, truncated_tar.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import NamedTuple


class DataError(RuntimeError):
    """The data cannot be used as asked: the message says what is wrong and what to do."""


class Skip(NamedTuple):
    """One sample left out: its number in the set, its key, the reason's name, and the details."""

    index: int
    key: str
    reason: str
    detail: str = ""


class SampleError(Exception):
    """Raised while reading a sample that must be skipped; carries the `Skip`."""

    def __init__(self, skip: Skip):
        super().__init__(f"{skip.key}: {skip.reason} {skip.detail}".rstrip())
        self.skip = skip


class SkipWarning(UserWarning):
    """A sample was skipped."""


class SkipCounter:
    """Counts distinct skipped samples by reason; `add` warns for the first few of each and enforces the budget.

    total: number of samples in the set. budget: the largest share of them that may be skipped.
    """

    SHOWN = 3  # warnings per reason; the counts go on

    def __init__(self, total: int, budget: float):
        self.total, self.budget = total, budget
        self.counts: Counter[str] = Counter()
        self._seen: set[int] = set()

    def add(self, skip: Skip) -> None:
        """Count a skip (a sample counts once). Raises DataError with all counts once the budget is exceeded."""
        if skip.index in self._seen:
            return
        self._seen.add(skip.index)
        self.counts[skip.reason] += 1
        shown = self.counts[skip.reason]
        if shown <= self.SHOWN:
            last = "; further ones are only counted" if shown == self.SHOWN else ""
            detail = f" ({skip.detail})" if skip.detail else ""
            warnings.warn(f"skipped {skip.key}: {skip.reason}{detail}{last}", SkipWarning, stacklevel=2)
        if len(self._seen) > self.budget * self.total:
            raise DataError(
                f"{len(self._seen)} of {self.total} samples were skipped ({self}), more than skip_budget = {self.budget:g} "
                f"allows; the last was {skip.key}: {skip.reason}. Repair the data, or raise skip_budget."
            )

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items())) or "none"
