"""Samples that can't be used: counted by reason, warned about, and an error once they exceed a budget. See docs/skips.md.

Reasons for a sample: broken_image, truncated_image, too_large, unsupported_depth, unsupported_format, missing_image,
missing_caption, broken_json, truncated_tar, unsorted_tar. Files that belong to no sample (foreign members, truncated archives without an
index, ...) are counted in a `Tally` and reported once, at the start.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

HARMLESS = frozenset(("foreign_member", "foreign_archive", "name_without_suffix"))
"""Reasons for leaving a file out that don't lose a sample."""


class DataError(RuntimeError):
    """The data can't be used as requested: the message says what is wrong and what to do."""


class Skip(NamedTuple):
    """One sample left out: its number in the set, its key, the reason's name, and the details."""

    index: int
    key: str
    reason: str
    detail: str = ""


@dataclass
class Tally:
    """Counts of what was left out, by reason, each with its first example."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        self.counts[reason] += count
        self.examples.setdefault(reason, example)

    def merge(self, other: Tally, place: str | None = None) -> None:
        """Add another tally; `place`, if given, is prepended to its examples."""
        for reason, count in other.counts.items():
            example = other.examples[reason]
            self.add(reason, example if place is None else f"{place}: {example}", count)

    def __str__(self) -> str:
        return printable(
            "; ".join(f"{count} {reason} ({self.examples[reason]})" for reason, count in sorted(self.counts.items()))
        )


def printable(text: str) -> str:
    """The text on one line and without lone surrogates (from names that are not UTF-8), which can't be written to a stream."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text.encode("utf-8", "backslashreplace").decode()


class SampleError(Exception):
    """Raised while reading a sample that must be skipped; carries the `Skip`."""

    def __init__(self, skip: Skip):
        super().__init__(printable(f"{skip.key}: {skip.reason} {skip.detail}".rstrip()))
        self.skip = skip


class SkipWarning(UserWarning):
    """A sample was skipped, or files of an archive were left out."""


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
            warnings.warn(printable(f"skipped {skip.key}: {skip.reason}{detail}{last}"), SkipWarning, stacklevel=2)
        if len(self._seen) > self.budget * self.total:
            raise DataError(
                f"{len(self._seen)} of {self.total} samples were skipped ({self}), more than skip_budget = {self.budget:g} "
                f"allows; the last was {printable(skip.key)}: {skip.reason}. Repair the data, or raise skip_budget."
            )

    def note(self, reason: str, count: int) -> None:
        """Count samples that are lost but have no number, such as those after the truncation of a tar without an index. They are
        not part of the budget, since the set's size doesn't include them either."""
        self.counts[reason] += count

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items())) or "none"
