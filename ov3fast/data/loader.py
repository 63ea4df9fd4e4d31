"""Batches by step number: `loader.batch(step)` costs the same for every step and depends on nothing else.

    loader = Loader(config, image_size=64, batch_size=288)
    for batch in loader.batches(start=step): ...

Each source goes through its own epochs: `Order` gives its unit (sample or concept) number `cursor`, and a batch takes an exact
share of every source. A rank takes its slice of the global batch, so the numbers of ranks and workers may change between runs. Crops,
backgrounds and captions are functions of (seed, sample, variant); the variant counts the passes over a sample.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ov3fast.data import hash_rng, mixing
from ov3fast.data.captions import pick_caption
from ov3fast.data.config import DataConfig
from ov3fast.data.crops import Crops
from ov3fast.data.jpeg import Reduced
from ov3fast.data.order import Order
from ov3fast.data.shards import Sample
from ov3fast.data.skips import DataError, SampleError, Skip, SkipCounter
from ov3fast.data.store import SampleStore, Source
from ov3fast.data.threads import Threads

SUBSTITUTES = 100  # units tried in place of one that can't be used


@dataclass
class Batch:
    """One rank's share of a step: M images, P texts, V images of each text.

    Rows go source by source, and within a paired source view by view.
    """

    step: int
    images: Tensor | None
    """float32 [M, 3, S, S] in [-1, 1]; None if pixels were not requested."""
    index: Tensor
    """int64 [M], global sample numbers."""
    variant: Tensor
    """int64 [M], the augmentation of the sample."""
    keys: list[str]
    """M sample keys."""
    text: list[str]
    """P contrastive texts."""
    pairs: Tensor
    """int64 [V, P]: the row of view v of text p."""
    captions: list[str]
    """M texts for the captioner; "" for images without text."""
    planned: np.ndarray
    """int64: the units of all ranks in order, before substitutes; feed it to `order_hash`."""
    cursors: tuple[int, ...]
    """Units drawn from each source up to and including this step: where a next stage starts."""
    skips: tuple[Skip, ...] = field(default=())
    """Samples found unusable while this batch was made."""
    moments: Tensor | None = None
    """[M, 2C, h, w] in the VAE's dtype, if the loader has `latents`."""


class Latents(Protocol):
    """The VAE's moments by sample and variant: latent_shards.LatentShards."""

    def skip(self, index: int) -> Skip | None: ...

    def __call__(self, index: np.ndarray, variant: np.ndarray, keys: Sequence[str]) -> Tensor: ...


class Loader:
    """Batches of one stage; see the module's docstring.

    data: a DataConfig, or a SampleStore to share between stages. batch_size: images over all ranks. cursors: units already drawn
    from each source (`cursors` of the previous stage's last batch). train=False: centre crops on white.
    Raises ValueError if the batch can't be divided over sources, views and ranks; DataError for unusable data.
    """

    def __init__(
        self,
        data: DataConfig | SampleStore,
        *,
        image_size: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        cursors: tuple[int, ...] | None = None,
        train: bool = True,
    ):
        self.store = data if isinstance(data, SampleStore) else SampleStore(data)
        self.config, self.sources = self.store.config, self.store.sources
        self.image_size, self.batch_size, self.rank, self.world, self.train = image_size, batch_size, rank, world, train
        self.weights = mixing.weights([source.config.fraction for source in self.sources])
        if self.config.mixing == "batch":
            self.units = mixing.units_per_step(self.sources, batch_size, world)
        else:
            mixing.check_stream(self.sources, batch_size, world)
            mixing.drawn(0, self.weights)  # caches the schedule before worker processes inherit it
        self.start = tuple(cursors) if cursors is not None else (0,) * len(self.sources)
        if len(self.start) != len(self.sources):
            raise ValueError(f"cursors: got {len(self.start)} of them; there are {len(self.sources)} sources")
        seed, window = self.config.seed, self.config.shard_window
        self.orders = [
            Order(source.unit_lengths, int(hash_rng.bits(seed, hash_rng.ORDER, k)), window)
            for k, source in enumerate(self.sources)
        ]
        self._threads, self._fetchers = Threads(self.config.threads), Threads(4)
        self.crops = Crops(self.store, image_size, train, self._threads)
        self._asked_for: dict[tuple[int, int], None] = {}
        self.latents: Latents | None = None
        """If set, every batch has moments, and samples without them are skipped."""
        self.skips = SkipCounter(self.store.n, self.config.skip_budget)
        if self.store.uncounted:
            self.skips.note("truncated_tar", self.store.uncounted)
        for skip in self.store.skipped():
            self.skips.add(skip)

    @property
    def samples(self) -> int:
        """Samples in all sources."""
        return self.store.n

    def usable(self) -> np.ndarray:
        """int64: the global numbers of all usable samples (with `cache_images`)."""
        return self.store.usable()

    def cursors(self, step: int) -> tuple[int, ...]:
        """Units drawn from each source before this step."""
        return tuple(start + count for start, count in zip(self.start, self._drawn_before(step, 0, 1), strict=True))

    def _drawn_before(self, step: int, rank: int, world: int) -> list[int]:
        """Units drawn from each source before `rank`'s share of a step, among `world` ranks."""
        if self.config.mixing == "stream":
            return mixing.drawn(step * self.batch_size + rank * self.batch_size // world, self.weights)
        return [step * units + rank * units // world for units in self.units]

    def epoch(self, step: int) -> float:
        """Passes over the first source before this step."""
        return self.cursors(step)[0] / self.orders[0].n

    # ---- batches ----

    def batches(self, start: int = 0, stop: int | None = None, pixels: bool = True) -> Iterator[Batch]:
        """Batches of steps start, start + 1, ..., prefetched by `config.workers` processes. Counts skips and enforces their budget."""
        steps = range(start, sys.maxsize if stop is None else stop)
        if self.config.workers == 0:
            made = (self.batch(step, pixels) for step in steps)
        else:
            made = torch.utils.data.DataLoader(
                _Steps(self, pixels), batch_size=None, sampler=steps, num_workers=self.config.workers, collate_fn=_unchanged,
                worker_init_fn=_ignore_signals,
            )  # fmt: skip
        for batch in made:
            for skip in batch.skips:
                self.skips.add(skip)
            yield batch

    def batch(self, step: int, pixels: bool = True) -> Batch:
        """The batch of a step. pixels=False leaves the images out (with `cache_images` or `latents`, which know the skips)."""
        if not pixels and not self.config.cache_images and self.latents is None:
            raise ValueError(
                "pixels: False needs data.cache_images or latents; otherwise broken images would be found too late"
            )
        skips: dict[int, Skip] = {}
        images: dict[int, object] = {}  # decoded in this batch, by global number
        index: list[int] = []
        variant: list[int] = []
        keys: list[str] = []
        captions: list[str] = []
        text: list[str] = []
        pairs: list[np.ndarray] = []
        planned: list[np.ndarray] = []
        edges = zip(
            self._drawn_before(step, 0, 1), self._drawn_before(step, self.rank, self.world),
            self._drawn_before(step, self.rank + 1, self.world), self._drawn_before(step + 1, 0, 1), strict=True,
        )  # fmt: skip
        self._read_ahead(step)
        for k, (source, start, (first_unit, low, high, last_unit)) in enumerate(
            zip(self.sources, self.start, edges, strict=True)
        ):
            positions = start + np.arange(first_unit, last_unit)
            chosen = self.orders[k][positions]
            planned.append(source.offset + chosen)
            mine = slice(low - first_unit, high - first_unit)
            drawn = self._draw(k, positions[mine], chosen[mine], pixels, images, skips)
            views, first = source.config.views, len(index)
            for view in range(views):
                for unit in drawn:
                    index.append(unit.index[view])
                    variant.append(unit.variant[view])
                    keys.append(unit.samples[view].key)
                    captions.append(unit.captions[view])
            if source.config.paired:
                text += [unit.text for unit in drawn]
                pairs.append(first + np.arange(views * len(drawn)).reshape(views, len(drawn)))
        rows, variants = np.array(index, np.int64), np.array(variant, np.int64)
        return Batch(
            step=step,
            images=self.crops(rows, variants, images) if pixels else None,
            index=torch.from_numpy(rows),
            variant=torch.from_numpy(variants),
            keys=keys,
            text=text,
            pairs=torch.from_numpy(np.concatenate(pairs, 1) if pairs else np.zeros((1, 0), np.int64)),
            captions=captions,
            planned=np.concatenate(planned),
            cursors=self.cursors(step + 1),
            skips=tuple(skips.values()),
            moments=None if self.latents is None else self.latents(rows, variants, keys),
        )

    def _draw(self, k: int, positions: np.ndarray, units: np.ndarray, pixels: bool, images: dict, skips: dict) -> list[_Drawn]:
        """Choose `views` samples of every unit; a unit without a usable sample is replaced by one chosen by its position."""
        source, seed = self.sources[k], self.config.seed
        epochs = positions // source.units
        members = self._members(k, units, epochs)
        uniforms = hash_rng.uniform(seed, hash_rng.CAPTION, k, units, epochs).tolist()
        ready = self._read_many([index for group in members for index in group[: source.config.views]], epochs, pixels)
        drawn = []
        for position, epoch, u, candidates in zip(positions.tolist(), epochs.tolist(), uniforms, members, strict=True):
            found = self._usable(candidates, source.config.views, epoch, pixels, images, skips, ready)
            attempt = 0
            while not found:
                if attempt == SUBSTITUTES:
                    last = next(reversed(skips.values()))
                    raise DataError(
                        f"{source.config.path}: {attempt} samples in a row can't be used, the last for {last.reason}"
                    )
                other = hash_rng.bits(seed, hash_rng.SUBSTITUTE, k, position, attempt) % np.uint64(source.units)
                [candidates] = self._members(k, np.array([other], np.int64), np.array([epoch]))
                found = self._usable(candidates, source.config.views, epoch, pixels, images, skips, ready)
                attempt += 1
            drawn.append(self._drawn(source, epoch, u, found))
        return drawn

    def _members(self, k: int, units: np.ndarray, epochs: np.ndarray) -> list[list[int]]:
        """Global sample numbers of each unit, in an order that changes with the epoch."""
        groups = [self.sources[k].members(unit) for unit in units.tolist()]
        lengths = [len(group) for group in groups]
        if not groups or max(lengths) == 1:
            return [group.tolist() for group in groups]
        flat, which = np.concatenate(groups), np.repeat(np.arange(len(groups)), lengths)
        ranks = hash_rng.bits(self.config.seed, hash_rng.MEMBER, k, units[which], epochs[which], flat)
        flat = flat[np.lexsort((ranks, which))]
        return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]

    def _read_many(self, indices: list[int], epochs: np.ndarray, pixels: bool) -> dict[int, Any]:
        """Global number -> (image, sample), or the SampleError; {} unless the config asks for threads. epochs: one per unit, and so one
        per index if a unit is one sample."""
        if self.config.threads == 1 or self.config.cache_images:
            return {}
        one_each = len(epochs) == len(indices)

        def read(item: tuple[int, int]) -> Any:
            index, epoch = item
            if self.latents is not None and self.latents.skip(index) is not None:
                return None
            try:
                return self.store.sample(index, decode=pixels, shrink=self.crops.shrink(index, epoch) if one_each else None)
            except SampleError as error:
                return error

        first = dict(zip(indices, epochs.tolist() if one_each else [0] * len(indices), strict=True))
        return dict(zip(first, self._threads.map(read, list(first.items())), strict=True))

    def _read_ahead(self, step: int) -> None:
        """Starts fetching a later step's tars into the cache."""
        ahead, sources = self.config.read_ahead, [k for k, source in enumerate(self.sources) if source.fetches]
        if not ahead or not sources:
            return
        low = self._drawn_before(step + ahead, self.rank, self.world)
        high = self._drawn_before(step + ahead, self.rank + 1, self.world)
        for k in sources:
            source = self.sources[k]
            for unit in self.orders[k][self.start[k] + np.arange(low[k], high[k])].tolist():
                for index in source.members(unit)[: source.config.views].tolist():
                    shard = source.dataset.shard_of(index - source.offset)
                    if (k, shard) not in self._asked_for:
                        self._asked_for[k, shard] = None
                        if len(self._asked_for) > 4096:
                            del self._asked_for[next(iter(self._asked_for))]
                        self._fetchers.submit(source.dataset.fetch, index - source.offset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_asked_for": {}}

    def _usable(
        self, members: list[int], views: int, epoch: int, pixels: bool, images: dict, skips: dict, ready: dict[int, Any]
    ) -> list[tuple[int, Sample]]:
        """The first `views` samples that can be read; the others are recorded in `skips`."""
        found: list[tuple[int, Sample]] = []
        for index in members:
            if self.latents is not None and (skip := self.latents.skip(index)) is not None:
                skips[index] = skip
                continue
            try:
                given = ready[index] if index in ready else self.store.sample(index, pixels, self.crops.shrink(index, epoch))
                if isinstance(given, SampleError):
                    raise given
                images[index], sample = given
                if self.config.decode == "fast" and pixels:
                    # This source has one view: see _drawn.
                    variant = epoch if self.config.variants is None else epoch % self.config.variants
                    if isinstance(images[index], Reduced):
                        images[index].variant = variant
            except SampleError as error:
                skips[index] = error.skip
                continue
            found.append((index, sample))
            if len(found) == views:
                break
        return found

    def _drawn(self, source: Source, epoch: int, u: float, found: list[tuple[int, Sample]]) -> _Drawn:
        """A unit's rows: its samples, repeated as other variants if there are fewer than `views`; text and captions."""
        views, repeats = source.config.views, -(-source.config.views // len(found))
        variants = [epoch * repeats + view // len(found) for view in range(views)]
        if self.config.variants is not None:
            variants = [variant % self.config.variants for variant in variants]
        index, samples = zip(*(found[view % len(found)] for view in range(views)), strict=True)
        if not source.config.paired:
            return _Drawn(index, variants, samples, "", [""] * views)
        first, others = found[0][1].captions, [sample.captions for _, sample in found[1:]]
        shared = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
        text = pick_caption(shared, source.config.captions, u) or pick_caption(first, source.config.captions, u)
        described = [pick_caption(sample.captions, ((source.config.caption_key, 1.0),), u) for sample in samples]
        captions = [(caption or "").strip() or text for caption in described]
        return _Drawn(index, variants, samples, text, captions)

    def pixels(self, index: Tensor, variant: Tensor) -> Tensor:
        """Images by global number and variant, int64 [M] each -> float32 [M, 3, S, S] in [-1, 1], as in a batch."""
        return self.crops(np.asarray(index, np.int64), np.asarray(variant, np.int64), {})


@dataclass
class _Drawn:
    """One unit's `views` rows of a batch."""

    index: tuple[int, ...]
    variant: list[int]
    samples: tuple[Sample, ...]
    text: str
    captions: list[str]


class _Steps(torch.utils.data.Dataset):
    """Step number -> batch, for the worker processes."""

    def __init__(self, loader: Loader, pixels: bool):
        self.loader, self.pixels = loader, pixels

    def __getitem__(self, step: int) -> Batch:
        return self.loader.batch(step, self.pixels)


def _ignore_signals(worker: int) -> None:
    """Leaves signals sent to the whole process group (Ctrl-C, `timeout`, schedulers) to the run, which saves and ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Batch) -> Batch:
    return batch
