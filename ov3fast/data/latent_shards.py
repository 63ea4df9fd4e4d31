"""Moments of a frozen VAE on disk: what `ov3fast data encode` writes once and training reads in place of the images.

    cache/256/                     one folder for each image size
      cache.json                   what the moments depend on: VAE, crop, size, sources, ...
      0000000000.safetensors       samples 0, 1, ...: moments [n, V, 2C, h, w], image [n, 32] (sha256 of the image files)
      0000002048.safetensors       the next ones

Samples are numbered as in the run, source after source. Parts are written atomically and dealt to processes, so any number of
processes may encode, be stopped and resume. Unusable samples are recorded with the reason, so the loader draws the same
substitutes as with images.

Legend: V variants (crops) of a sample, C latent channels, h x w the latents' size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ov3fast.data.config import DataConfig
from ov3fast.data.images import DECODE_VERSION, ImageError, decode_image, decode_reduced
from ov3fast.data.jpeg import Reduced
from ov3fast.data.loader import Loader
from ov3fast.data.skips import DataError, SampleError, Skip
from ov3fast.data.store import SampleStore
from ov3fast.data.transforms import premultiplied
from ov3fast.io import atomic_write

CACHE = "cache.json"
PART_BYTES = 2**28
"""About the size of a part."""
MAX_OPEN_PARTS = 64
_RANDOM = ("seed", "min_area")
"""Facts that matter only if crops are random."""


def facts(config: DataConfig, store: SampleStore, image_size: int, **vae: Any) -> dict[str, Any]:
    """Everything that the moments depend on, named as the recipe's fields.

    vae: vae (hash of its weights), vae_dtype, vae_batch, latent_convention, shape [2C, h, w].
    """
    sources = []
    for source in store.sources:
        digest = hashlib.sha256()
        for name, samples in source.contents():
            digest.update(f"{name} {samples}\n".encode())
        sources.append({"samples": len(source.dataset), "shards": digest.hexdigest()})
    crop = {
        name: getattr(config, name) for name in ("crop", "interpolation", "flip", "background", "max_image_pixels", "variants")
    }
    if config.decode != "full":
        crop["decode"] = config.decode
    if config.crop == "inception" or config.flip or config.background != "white":
        crop |= {name: getattr(config, name) for name in _RANDOM}
    return {"image_size": image_size, **vae, **crop, "decode_version": DECODE_VERSION, "sources": sources}


class LatentShards:
    """Moments by sample and variant, read from the parts in `folder`/`image_size`.

    Raises FileNotFoundError if there is no cache of that size; ValueError, with the number of missing parts, if it is incomplete.
    """

    def __init__(self, folder: str | Path, image_size: int):
        root = Path(folder).expanduser()
        self.folder = root / str(image_size)
        if not (self.folder / CACHE).is_file():
            sizes = sorted(int(path.parent.name) for path in root.glob(f"*/{CACHE}") if path.parent.name.isdecimal())
            has = f"{root} holds {', '.join(map(str, sizes))} px" if sizes else f"there is no cache in {root}"
            raise FileNotFoundError(f"latents: {has}, but {image_size} px are needed; see `ov3fast data encode --help`")
        described = json.loads((self.folder / CACHE).read_text(encoding="utf-8"))
        self.facts: dict[str, Any] = described["facts"]
        self.part: int = described["part"]
        self.samples = sum(source["samples"] for source in self.facts["sources"])
        parts = range(0, self.samples, self.part)
        missing = [start for start in parts if not _path(self.folder, start).is_file()]
        if missing:
            raise ValueError(
                f"latents: {len(missing)} of {len(parts)} parts of {self.folder} are missing; run the same `ov3fast data encode` again"
            )
        self._open: OrderedDict[int, _Part] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def check(self, wanted: dict[str, Any]) -> None:
        """Raises ValueError naming the first fact in which a run (its `facts`) differs from the cache."""
        if not wanted["variants"] or wanted["variants"] > self.facts["variants"]:
            raise ValueError(
                f"latents: {self.folder} holds {self.facts['variants']} variants per sample, but data.variants is {wanted['variants']}; "
                f"set data.variants to {self.facts['variants']} or less, or encode more"
            )
        for name in dict.fromkeys([*wanted, *self.facts]):
            theirs, own = self.facts.get(name), wanted.get(name)
            if name == "variants" or theirs == own or (name == "vae_batch" and own is None):
                continue
            if name == "sources":
                theirs, own = ([source["samples"] for source in side] for side in (theirs, own))
                what = "other shards" if theirs == own else f"sources of {theirs} samples, the run's have {own}"
                raise ValueError(f"latents: {self.folder} was encoded from {what}; encode the run's sources, in their order")
            raise ValueError(
                f"latents: {self.folder} was encoded with {name} {_short(theirs)}, the run has {_short(own)}; "
                "encode again with the run's value, or change the run"
            )

    def skip(self, index: int) -> Skip | None:
        """Why a sample has no moments; None if it has them."""
        return self._at(index).skips.get(index)

    def __call__(self, index: np.ndarray, variant: np.ndarray, keys: Sequence[str]) -> Tensor:
        """index, variant int64 [m] and the samples' keys -> [m, 2C, h, w] in the VAE's dtype.

        DataError if a key is not the one that was encoded: the shards have changed since.
        """
        rows = torch.empty(len(index), *self.facts["shape"], dtype=_dtype(self.facts))
        for row, i, v, key in zip(rows, index.tolist(), variant.tolist(), keys, strict=True):
            part = self._at(i)
            place = i - part.start
            if part.keys[place] != key:
                raise DataError(
                    f"latents: sample {i} is {key!r} in the shards, {part.keys[place]!r} in {self.folder}: the shards have changed "
                    "since; encode them again"
                )
            row.copy_(part.moments[place : place + 1, v : v + 1][0, 0])
        return rows

    def image_hash(self, index: int) -> bytes:
        """sha256 of the encoded image file."""
        part = self._at(index)
        return part.file.get_slice("image")[index - part.start : index - part.start + 1].numpy().tobytes()

    def _at(self, index: int) -> _Part:
        start = index // self.part * self.part
        if start not in self._open:
            if len(self._open) >= MAX_OPEN_PARTS:
                self._open.popitem(last=False)
            self._open[start] = _Part(_path(self.folder, start), start)
        self._open.move_to_end(start)
        return self._open[start]


class _Part:
    """One file, memory-mapped."""

    def __init__(self, path: Path, start: int):
        from safetensors import SafetensorError, safe_open

        self.start = start
        try:
            self.file = safe_open(str(path), "pt")
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"latents: {path} can't be read ({error}); delete it and run the same `ov3fast data encode` again"
            ) from None
        samples = json.loads(self.file.metadata()["samples"])
        self.keys: list[str] = samples["keys"]
        self.skips = {skip[0]: Skip(*skip) for skip in samples["skips"]}
        self.moments = self.file.get_slice("moments")


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_latents(
    config: DataConfig,
    folder: str | Path,
    image_size: int,
    encode: Callable[[Tensor], Tensor],
    vae: dict[str, Any],
    *,
    process: int = 0,
    processes: int = 1,
    workers: int = 2,
    part: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Encodes this process's missing parts; returns the number of samples encoded now.

    encode(images [vae_batch, 3, S, S] in [-1, 1]) -> moments [vae_batch, 2C, h, w]: called with full batches only, the last one
    padded, so that an image's bits don't depend on the number of images. vae: as in `facts`. workers: threads that decode and crop
    ahead. part: samples per part; None: about PART_BYTES. progress(samples done, total). ValueError if the folder holds a cache of
    something else.
    """
    if not config.variants:
        raise ValueError("variants: set the number of crops to keep of each sample")
    store = SampleStore(plain(config))
    target = Path(folder).expanduser() / str(image_size)
    sample_bytes = config.variants * int(np.prod(vae["shape"])) * _dtype(vae).itemsize
    part = _describe(target, facts(config, store, image_size, **vae), part or max(1, PART_BYTES // sample_bytes))
    ranges = [
        range(start, min(start + part, store.n)) for start in range(0, store.n, part) if start // part % processes == process
    ]
    missing = [numbers for numbers in ranges if not _path(target, numbers.start).is_file()]
    total, done = sum(map(len, missing)), 0
    loader = Loader(store, image_size=image_size, batch_size=len(store.sources))
    saving: Future | None = None
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as writer:
        samples = _ahead(
            pool, lambda i: _read(loader, i), (i for numbers in missing for i in numbers), workers + vae["vae_batch"]
        )
        for numbers in missing:
            made = _encode_part(
                samples, numbers, encode, config.variants, vae, lambda n, before=done: progress(before + n, total)
            )
            done += len(numbers)
            if saving is not None:
                saving.result()  # one part is written while the next is encoded
            saving = writer.submit(_save, _path(target, numbers.start), *made)
        if saving is not None:
            saving.result()
    return done


def plain(config: DataConfig) -> DataConfig:
    """The same samples under the same numbers, drawn one by one: grouping, pairing and mixing don't matter to the VAE."""
    sources = (dataclasses.replace(source, fraction=1.0, group_by=None, views=1, paired=False) for source in config.sources)
    return dataclasses.replace(config, sources=tuple(sources), cache_images=False)


@dataclasses.dataclass
class _Read:
    """A sample on its way to the VAE."""

    index: int
    key: str
    image: bytes
    """sha256 of the file; zeros if there is none."""
    pixels: Tensor | None
    """[V, 3, S, S]; None for a sample to skip."""
    skip: Skip | None = None


def _read(loader: Loader, index: int) -> _Read:
    """Decodes and crops one sample."""
    source = loader.store.source_of(index)
    key, digest = "", bytes(32)
    try:
        key, content = source.dataset.image_bytes(index - source.offset)
        digest = hashlib.sha256(content).digest()
        variants = range(loader.config.variants or 1)
        shrinks = [loader.crops.shrink(index, variant) for variant in variants]
        limit = loader.config.max_image_pixels
        decoded = [decode_reduced(content, shrink, limit) for shrink in shrinks if shrink] or [decode_image(content, limit)]
        pictures = [premultiplied(picture) for picture in decoded]
    except ImageError as error:
        return _Read(index, key, digest, None, Skip(index, key, error.reason, str(error)))
    except SampleError as error:
        return _Read(index, error.skip.key, digest, None, error.skip._replace(index=index))
    if len(variants) == 1 or len(pictures) == 1:  # decoded in full: one image serves all variants
        return _Read(index, key, digest, loader.crops(np.full(len(variants), index), np.array(variants), {index: pictures[0]}))
    for variant, picture in zip(variants, pictures, strict=True):
        if isinstance(picture, Reduced):
            picture.variant = variant
    crops = [loader.crops(np.array([index]), np.array([v]), {index: pictures[v]}) for v in variants]
    return _Read(index, key, digest, torch.cat(crops))


def _ahead(pool: ThreadPoolExecutor, read: Callable[[int], _Read], indices: Iterable[int], depth: int) -> Iterator[_Read]:
    """read(i) in order, up to `depth` of them in flight."""
    pending: deque[Future[_Read]] = deque()
    for index in indices:
        pending.append(pool.submit(read, index))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode_part(
    samples: Iterator[_Read],
    numbers: range,
    encode: Callable[[Tensor], Tensor],
    variants: int,
    vae: dict[str, Any],
    progress: Callable[[int], None],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a part."""
    batch = vae["vae_batch"]
    moments = torch.zeros(len(numbers), variants, *vae["shape"], dtype=_dtype(vae))
    image = np.zeros((len(numbers), 32), np.uint8)
    keys: list[str] = []
    skips: list[Skip] = []
    waiting: list[tuple[int, int, Tensor]] = []  # (row, variant, pixels) of an unfinished batch

    def flush() -> None:
        pixels = torch.stack([crop for _, _, crop in waiting])
        for (row, variant, _), made in zip(waiting, in_full_batches(encode, pixels, batch).cpu(), strict=True):
            moments[row, variant] = made.to(moments.dtype)
        waiting.clear()

    for row, number in enumerate(numbers):
        sample = next(samples)
        assert sample.index == number
        keys.append(sample.key)
        image[row] = np.frombuffer(sample.image, np.uint8)
        if sample.skip is not None:
            skips.append(sample.skip)
        for variant, crop in enumerate(() if sample.pixels is None else sample.pixels):
            waiting.append((row, variant, crop))
            if len(waiting) == batch:
                flush()
        progress(row + 1)
    if waiting:
        flush()
    # One entry: safetensors writes several in no fixed order, and equal caches should be equal bytes.
    return {"moments": moments, "image": torch.from_numpy(image)}, {"samples": json.dumps({"keys": keys, "skips": skips})}


def in_full_batches(encode: Callable[[Tensor], Tensor], images: Tensor, batch: int | None) -> Tensor:
    """encode(images) in calls of `batch` images each, the last one padded with zeros; None: all in one call.

    Every call has the same shape, and so uses the same algorithm: an image's result has the same bits whatever its neighbours.
    """
    if batch is None:
        return encode(images)
    made = []
    for part in images.split(batch):
        full = part if len(part) == batch else torch.cat([part, part.new_zeros(batch - len(part), *part.shape[1:])])
        made.append(encode(full)[: len(part)])
    return torch.cat(made)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(tensors, str(temporary), metadata)


def _describe(target: Path, wanted: dict[str, Any], part: int) -> int:
    """Writes cache.json, or checks the existing one; returns the number of samples per part, which the first process decides."""
    if (target / CACHE).is_file():
        described = json.loads((target / CACHE).read_text(encoding="utf-8"))
        for name in dict.fromkeys([*wanted, *described["facts"]]):
            theirs, own = described["facts"].get(name), wanted.get(name)
            if theirs != own:
                raise ValueError(
                    f"latents: {target} holds a cache with {name} {_short(theirs)}, this one has {_short(own)}; name another folder"
                )
        return described["part"]
    with atomic_write(target / CACHE) as temporary:
        temporary.write_text(json.dumps({"facts": wanted, "part": part}, indent=1) + "\n", encoding="utf-8")
    return part


def _path(folder: Path, start: int) -> Path:
    return folder / f"{start:010d}.safetensors"


def _dtype(facts: dict[str, Any]) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[facts["vae_dtype"]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:16] + "..."
