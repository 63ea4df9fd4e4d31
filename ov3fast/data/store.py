"""All samples of a run's sources under one numbering: their images, captions and concepts.

A sample's global number (its index) is its source's offset plus its number in the source. With `cache_images` everything is
decoded once, at the start, and unusable samples are known from then on. Without it, they are found when they are read. Either
way the loader draws the same substitutes, so the setting changes no batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ov3fast.data.assets import default_cache_dir
from ov3fast.data.captions import texts_under
from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.data.shards import Sample, ShardDataset
from ov3fast.data.skips import DataError, SampleError, Skip
from ov3fast.data.source import PREFIX, GivenSource, given_source
from ov3fast.data.transforms import premultiplied
from ov3fast.data.urls import LocalCache, is_url

if TYPE_CHECKING:
    from PIL import Image

Shrink = Callable[[int, int], int]
LOOKED_AT = 16  # samples read at the start to check that the configured keys exist


class Source:
    """One source: its dataset, where its numbers start, and its units (concepts, or single samples)."""

    def __init__(self, config: SourceConfig, offset: int, max_image_pixels: int, cache: LocalCache | None = None):
        self.config, self.offset = config, offset
        self.dataset: ShardDataset | GivenSource
        if config.path.startswith(PREFIX):
            self.dataset = given_source(config.path)
        else:
            self.dataset = ShardDataset(resolve(config.path), max_image_pixels, cache)
        self.groups: list[np.ndarray] | None = None  # concept -> global numbers of its samples
        if config.group_by is not None:
            self.groups = self._group(config.group_by)

    @property
    def units(self) -> int:
        return len(self.dataset) if self.groups is None else len(self.groups)

    @property
    def unit_lengths(self) -> list[int]:
        """Units per shard, for the order."""
        return self.dataset.lengths if self.groups is None else [len(self.groups)]

    def contents(self) -> list[tuple[str, int]]:
        """(name, samples) of each shard."""
        if isinstance(self.dataset, GivenSource):
            return [(self.dataset.name, len(self.dataset))]
        return [(shard.path.name, shard.samples) for shard in self.dataset.shards]

    def stamps(self) -> list[tuple[str, int, int, int]]:
        """Each shard's stamp, which changes with its file (see Shard.stamp)."""
        if isinstance(self.dataset, GivenSource):
            return [(self.dataset.name, len(self.dataset), 0, 0)]
        return [shard.stamp() for shard in self.dataset.shards]

    @property
    def fetches(self) -> bool:
        """Whether tars are fetched into a cache."""
        return isinstance(self.dataset, ShardDataset) and self.dataset.cache is not None

    def members(self, unit: int) -> np.ndarray:
        """Global numbers of a unit's samples."""
        return np.array([self.offset + unit]) if self.groups is None else self.groups[unit]

    def _group(self, field: str) -> list[np.ndarray]:
        found: dict[str, list[int]] = {}
        for i in range(len(self.dataset)):
            try:
                meta = self.dataset.text(i).meta
            except SampleError:
                continue  # an unreadable sample has no concept; reading its image reports it
            if field not in meta:
                raise DataError(
                    f"group_by: sample {i} of {self.config.path} has no field {field!r}; it has {', '.join(sorted(meta)) or 'none'}"
                )
            found.setdefault(str(meta[field]), []).append(self.offset + i)
        if not found:
            raise DataError(f"group_by: no sample of {self.config.path} could be read")
        return [np.array(numbers) for numbers in found.values()]


class SampleStore:
    """Images and texts of all sources by global number; see the module's docstring."""

    def __init__(self, config: DataConfig):
        if not config.sources:
            raise DataError("data.sources: there is no source; name a folder of tar shards (`ov3fast data demo` makes some)")
        self.config = config
        self.sources: list[Source] = []
        self.n = 0
        cache = None if config.cache_dir is None else LocalCache(config.cache_dir, config.cache_gib)
        for source in config.sources:
            self.sources.append(Source(source, self.n, config.max_image_pixels, cache))
            self.n += len(self.sources[-1].dataset)
            self._check_keys(self.sources[-1])
        self._offsets = np.array([source.offset for source in self.sources])
        self._images: dict[int, Image.Image] = {}
        self._texts: dict[int, Sample] = {}
        self._bad: dict[int, Skip] = {}
        if config.cache_images:
            self._load()

    def source_of(self, index: int) -> Source:
        return self.sources[int(np.searchsorted(self._offsets, index, side="right")) - 1]

    def image(self, index: int, shrink: Shrink | None = None) -> Image.Image:
        """The decoded image, mode RGB or RGBa. shrink: as in images.decode_reduced. Raises SampleError for a sample to skip."""
        return self._images[index] if index in self._images else self._read(index, shrink=shrink)[0]

    def sample(self, index: int, decode: bool, shrink: Shrink | None = None) -> tuple[Image.Image | None, Sample]:
        """The image (None unless requested or cached) and the text. shrink: as in images.decode_reduced. Raises SampleError for a sample to skip."""
        if index in self._bad:
            raise SampleError(self._bad[index])
        if index in self._texts:
            return self._images[index], self._texts[index]
        return self._read(index, decode, shrink)

    def skipped(self) -> list[Skip]:
        """Samples known to be unusable: all such samples with `cache_images`, otherwise those that the indexes name."""
        return [self._bad[index] for index in sorted(self._bad)]

    @property
    def uncounted(self) -> int:
        """Samples known to be lost that have no number, since no index counts those lost to a truncated tar."""
        return sum(source.dataset.uncounted for source in self.sources)

    def usable(self) -> np.ndarray:
        """Global numbers of the usable samples, int64; needs `cache_images`."""
        if not self.config.cache_images:
            raise ValueError("cache_images: it is off, so usable samples are not known before they are read")
        return np.array(sorted(self._images), np.int64)

    def _read(self, index: int, decode: bool = True, shrink: Shrink | None = None) -> tuple[Image.Image | None, Sample]:
        source = self.source_of(index)
        try:
            sample = source.dataset.read(index - source.offset, decode, shrink)
        except SampleError as error:
            raise SampleError(error.skip._replace(index=index)) from None
        keys = [key for key, p in source.config.captions if p > 0]
        if source.config.paired and not any(texts_under(sample.captions, key) for key in keys):
            wanted = ", ".join(f"{key} ({sample.refused[key]})" if key in sample.refused else key for key in keys)
            detail = f"none of {wanted} among {', '.join(sorted(sample.captions)) or 'no captions'}"
            raise SampleError(Skip(index, sample.key, "missing_caption", detail))
        return premultiplied(sample.image) if decode else None, sample._replace(image=None)

    def _load(self) -> None:
        """Decode everything with a thread pool (Pillow releases the GIL)."""

        def read(index: int) -> None:
            try:
                self._images[index], self._texts[index] = self._read(index)
            except SampleError as error:
                self._bad[index] = error.skip

        with ThreadPoolExecutor(self.config.workers or os.cpu_count()) as pool:
            for _ in pool.map(read, range(self.n)):
                pass

    def _check_keys(self, source: Source) -> None:
        """Fail at once if none of the configured caption keys is in the first samples."""
        if not source.config.paired:
            return
        found: set[str] = set()
        for sample in _first(source.dataset, LOOKED_AT):
            found.update(key for key in sample.captions if texts_under(sample.captions, key))
        keys = [key for key, p in source.config.captions if p > 0]
        if found and not found & set(keys):
            raise DataError(
                f"captions: the first samples of {source.config.path} have none of the keys {', '.join(map(repr, keys))}; "
                f"they have {', '.join(map(repr, sorted(found)))}"
            )


def _first(dataset: ShardDataset, count: int) -> Iterator[Sample]:
    for i in range(min(count, len(dataset))):
        try:
            yield dataset.text(i)
        except SampleError:
            continue  # reported when its turn comes


def resolve(path: str) -> str | Path:
    """ "demo:pairs-train" -> that folder of the demo set in the default cache; anything else unchanged."""
    if is_url(path) or not path.startswith("demo:"):
        return path
    folder = default_cache_dir() / "demo" / path.removeprefix("demo:")
    if not folder.exists():
        raise FileNotFoundError(f"path: {path!r} is not built ({folder} is missing); run `ov3fast data demo` first")
    return folder


Store = SampleStore  # the name up to 0.1.0
