"""Checks data without training: what a folder of shards contains, and which samples can't be used."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ov3fast.data.captions import texts_under
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.shards import Sample, ShardDataset
from ov3fast.data.skips import HARMLESS, SampleError, Skip, SkipWarning, Tally, printable
from ov3fast.data.store import resolve

SHOWN = 5  # skipped samples of each reason in the printed summary


@dataclass
class ShardSummary:
    """One tar: samples by its index, readable ones, skips by reason, whether it was cut short."""

    path: Path
    samples: int
    readable: int = 0
    skips: Counter = field(default_factory=Counter)
    truncated: bool = False


@dataclass
class Summary:
    """A set of shards: per shard, and over all of them."""

    shards: list[ShardSummary]
    captions: Counter
    """Caption key -> samples that have it."""
    skips: list[Skip]
    smallest: tuple[int, int] | None
    """Width and height of the image with the fewest pixels (None: no image is readable)."""
    largest: tuple[int, int] | None
    left_out: Tally = field(default_factory=Tally)
    """Files that belong to no sample: foreign members, truncated or empty archives, ..."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def readable(self) -> int:
        return sum(shard.readable for shard in self.shards)

    @property
    def skipped(self) -> int:
        return len(self.skips)

    @property
    def reasons(self) -> Counter:
        return sum((shard.skips for shard in self.shards), Counter())

    @property
    def complete(self) -> bool:
        """Whether every sample can be used, and none is among the files left out."""
        return not self.skips and self.left_out.counts.keys() <= HARMLESS

    def __str__(self) -> str:
        """Totals, the shards with something to report, and the first few skipped samples of each reason."""
        sizes = f"{_size(self.smallest)} to {_size(self.largest)}" if self.smallest else "none readable"
        lines = [
            f"{self.readable} of {self.samples} samples can be used, in {len(self.shards)} shards",
            f"  pictures: {sizes}",
            f"  captions: {_counts(self.captions)}",
            f"  skipped:  {_counts(self.reasons)}",
        ]
        if self.left_out:
            lines.append(f"  left out: {self.left_out}")
        for shard in self.shards:
            if shard.skips or shard.truncated:
                cut = ", cut short" if shard.truncated else ""
                skips = f": {_counts(shard.skips)}" if shard.skips else ""
                lines.append(f"  {shard.path}: {shard.readable} of {shard.samples}{cut}{skips}")
        for reason in self.reasons:
            for skip in [skip for skip in self.skips if skip.reason == reason][:SHOWN]:
                lines.append(f"    {reason}: {skip.key} ({skip.detail})")
        return "\n".join(map(printable, lines))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _counts(counts: Counter) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def summarise(
    shards: str | Path | Sequence[str | Path],
    *,
    caption_keys: Sequence[str] = (),
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    workers: int | None = None,
) -> Summary:
    """Read every sample of the shards; count what is there and what can't be used.

    caption_keys: a sample with none of these counts as missing_caption; if empty, a sample without any caption does.
    Raises FileNotFoundError and DataError for a wrong folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)  # the summary says it
        dataset = ShardDataset(resolve(str(shards)) if isinstance(shards, str) else shards, max_image_pixels)
        truncated = dataset.truncated()
    summaries = [ShardSummary(s.path, s.samples, truncated=s.path in truncated) for s in dataset.shards]
    captions: Counter = Counter()
    skips: list[Skip] = []
    sizes: list[tuple[int, int]] = []

    def read(i: int) -> Sample | Skip:
        try:
            sample = dataset[i]
        except SampleError as error:
            return error.skip
        present = [key for key in sample.captions if texts_under(sample.captions, key)]
        if not present or (caption_keys and not set(caption_keys) & set(present)):
            refused = ", ".join(
                f"{key} is {kind}" for key, kind in sample.refused.items() if not caption_keys or key in caption_keys
            )
            detail = f"it has {', '.join(present) or 'none'}" + (f"; {refused}" if refused else "")
            return Skip(i, sample.key, "missing_caption", detail)
        return sample._replace(image=None, meta={"size": sample.image.size})

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        locations = list(dataset.locations())
        for (number, _), result in zip(locations, pool.map(read, (i for _, i in locations)), strict=True):
            if isinstance(result, Skip):
                summaries[number].skips[result.reason] += 1
                skips.append(result)
            else:
                summaries[number].readable += 1
                captions.update(key for key in result.captions if texts_under(result.captions, key))
                sizes.append(result.meta["size"])
    area = sorted(sizes, key=lambda size: size[0] * size[1])
    return Summary(summaries, captions, skips, area[0] if area else None, area[-1] if area else None, dataset.left_out)
