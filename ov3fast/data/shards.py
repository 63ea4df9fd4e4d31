"""webdataset tar shards with random access: write them, read sample i, cope with what is broken in them.

Shards are written by webdataset's TarWriter with a wids index (`index.json`), which gives the number of samples of each
shard without opening it.

A sample is a group of files with the same key: an image (`key.jpg`, or another of images.IMAGE_SUFFIXES), `key.txt` (caption
"txt") and `key.json`, whose text fields are captions by name (img2dataset's layout), including those under "captions";
the other fields are its metadata. Captions that `join_captions` wrote beside the shard are added.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ov3fast.data import tar_index
from ov3fast.data.captions import read_captions, read_record, sidecar, text_of_bytes
from ov3fast.data.images import IMAGE_SUFFIXES, ImageError, decode_image, decode_reduced
from ov3fast.data.indexed_tar import OpenShard
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.shard_files import INDEX, Shard, find_shards, find_tars, tars_in, warn_left_out
from ov3fast.data.skips import DataError, SampleError, Skip, SkipWarning, Tally, printable
from ov3fast.data.tar_members import Member
from ov3fast.data.urls import LocalCache, Url
from ov3fast.io import atomic_folder, atomic_write

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["INDEX", "Sample", "Shard", "ShardDataset", "find_shards", "index_shards", "write_index", "write_shards"]

MAX_OPEN_SHARDS = 128
START_METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
"""For indexing processes: a fork starts at once, a new process has to import everything again."""


class Sample(NamedTuple):
    """One sample."""

    key: str
    image: Image.Image | None
    """Decoded, of mode RGB or RGBA; None if only the text was read."""
    captions: dict[str, str | tuple[str, ...]]
    """By key: one text, or several of which one is picked."""
    meta: dict[str, Any]
    refused: dict[str, str] = {}
    """Fields that are not captions, with what they hold instead: {"name": "null"}."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    folder: str | Path,
    samples_per_shard: int = 1000,
    info: Mapping[str, Any] | None = None,
) -> int:
    """Write (key, {suffix: bytes}) samples as `<folder>/00000.tar`, ... with a wids index; returns their number.

    `info` goes into the index. The folder is written atomically, and replaces that of an earlier call;
    FileExistsError names a file in it that no such call wrote.
    """
    from webdataset import TarWriter

    folder = Path(folder).expanduser()
    shards: list[dict[str, Any]] = []
    keys: set[str] = set()
    writer = None
    with atomic_folder(folder, _written_before(folder)) as temporary:
        for number, (key, files) in enumerate(samples):
            if key in keys:
                raise ValueError(f"samples: two have the key {key!r}; keys must differ")
            keys.add(key)
            if number % samples_per_shard == 0:
                if writer is not None:
                    writer.close()
                shards.append({"url": f"{len(shards):05d}.tar", "nsamples": 0})
                writer = TarWriter(str(temporary / shards[-1]["url"]), encoder=False, mtime=0)
            writer.write({"__key__": key, **files})
            shards[-1]["nsamples"] += 1
        if writer is not None:
            writer.close()
        _write_index(temporary, shards, folder.name, info or {})
    return sum(shard["nsamples"] for shard in shards)


def _written_before(folder: Path) -> set[str]:
    """Names that an earlier write_shards left in the folder: the tars in its index, and the files that belong to them."""
    try:
        tars = [entry["url"] for entry in json.loads((folder / INDEX).read_text())["shardlist"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {*tars, *(sidecar(name).name for name in tars), *(Path(name).with_suffix(tar_index.SUFFIX).name for name in tars)}


def write_index(folder: str | Path) -> Path:
    """Count the samples of a folder's tars and write a wids index, so that later starts need not scan them.

    Warns of what is left out, as a start without an index does.
    """
    folder = Path(folder).expanduser()
    left_out = Tally()
    found = find_tars(tars_in(folder, left_out))
    left_out.merge(found.left_out)
    warn_left_out(folder, left_out)
    shards = [{"url": shard.path.name, "nsamples": shard.samples} for shard in found.shards]
    for entry, shard in zip(shards, found.shards, strict=True):
        if shard.truncated:
            entry["truncated"] = True  # otherwise the next start would not know that samples are missing
    return _write_index(folder, shards, folder.name, {})


def index_shards(shards: str | Path | Sequence[str | Path], workers: int | None = None, again: bool = False) -> list[Shard]:
    """Writes an index beside every tar (see tar_index), and index.json into every named folder; returns the shards.

    Tars that have a valid index are skipped, unless `again`. A folder may be a URL. workers: processes; default: the CPUs. Warns of
    what is left out.
    """
    from ov3fast.data.shard_files import tars_to_index

    folders = tars_to_index(shards)
    tars = [tar for _, inside in folders for tar in inside]
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context(START_METHOD)) as pool:
        run = map if len(tars) < 2 or workers == 1 else partial(pool.map, chunksize=max(1, min(64, len(tars) // 64)))
        entries = iter(list(run(partial(_index_tar, again=again), tars)))
    found, left_out = [], Tally()
    for folder, inside in folders:
        listed = []
        for tar in inside:
            entry, left = next(entries)
            left_out.merge(left, str(tar))
            if entry is not None:
                listed.append(entry)
                found.append(Shard(tar, entry["nsamples"], "truncated" in entry, entry["filesize"]))
        if folder is not None and listed:
            _save_index(folder, listed, folder.name, {})
    warn_left_out(shards, left_out)
    return found


def _index_tar(tar: Path | Url, again: bool) -> tuple[dict[str, Any] | None, Tally]:
    """Writes a tar's index; returns its entry in index.json (None if it holds no sample) and what is left out."""
    shard = OpenShard(tar, use_index=not again)
    if isinstance(shard.samples, list):  # it was scanned
        if shard.problem:
            reason, _, detail = shard.problem.partition(": ")
            shard.left_out.add(reason, detail)
        else:
            tar_index.write(tar, tar_index.pack(shard, shard.size, shard.head()))
    if shard.cut is not None and not shard.problem:
        shard.left_out.add("truncated_tar", f"it ends after {len(shard.samples)} whole samples")
    entry: dict[str, Any] = {"url": tar.name, "nsamples": len(shard.samples), "filesize": shard.size}
    if shard.cut is not None:
        entry["truncated"] = True
    shard.close()
    return entry if len(shard.samples) else None, shard.left_out


def _write_index(folder: Path, shards: list[dict[str, Any]], name: str, info: Mapping[str, Any]) -> Path:
    for shard in shards:
        shard["filesize"] = (folder / shard["url"]).stat().st_size
    return _save_index(folder, shards, name, info)


def _save_index(folder: Any, shards: list[dict[str, Any]], name: str, info: Mapping[str, Any]) -> Any:
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": shards, "info": dict(info)}
    text = json.dumps(index, indent=1)
    if isinstance(folder, Url):
        (folder / INDEX).write_bytes(text.encode())
    else:
        with atomic_write(folder / INDEX) as temporary:
            temporary.write_text(text)
    return folder / INDEX


# ---- reading ---------------------------------------------------------------------------------------------------------


class ShardDataset:
    """Random access to the samples of tar shards: `dataset[i] -> Sample`; it can be pickled for worker processes.

    Opening warns of what is left out of the set, and keeps it in `left_out`. Reading raises SampleError with a named reason
    for a sample that must be skipped; see ov3fast.data.skips. cache: keeps whole tars from URLs; None: each sample's bytes
    are fetched when it is read.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        cache: LocalCache | None = None,
    ):
        self.cache = cache
        found = find_tars(shards)
        self.shards, self.left_out, self._looked_into = found.shards, found.left_out, found.looked_into
        self.uncounted = found.uncounted
        """Samples known to be lost to truncations that no index counts; they have no number here."""
        self.max_image_pixels = max_image_pixels
        self.lengths = [shard.samples for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        if not len(self):
            raise DataError(f"shards: there is no sample in {', '.join(str(s.path) for s in self.shards[:3])}")
        warn_left_out(shards, self.left_out)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_opening", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=OrderedDict(), _opening={}, _lock=threading.Lock())

    def locations(self) -> Iterator[tuple[int, int]]:
        """(shard number, sample number) of all samples."""
        for shard, length in enumerate(self.lengths):
            for i in range(length):
                yield shard, int(self._starts[shard]) + i

    def truncated(self) -> dict[Path, int]:
        """The truncated shards, with the number of samples known to be lost (from the index, or at least one). Opens every shard."""
        lost = {}
        for number, shard in enumerate(self.shards):
            opened = self._shard(number)
            if opened.cut is not None:
                lost[shard.path] = max(shard.samples - len(opened.samples), 1)
        return lost

    def text(self, i: int) -> Sample:
        """The sample without its image."""
        return self.read(i, decode=False)

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    def keys(self, indices: Sequence[int]) -> list[str]:
        """The samples' keys, without reading the samples. Raises SampleError for one that the index lists and the tar lacks."""
        return [self._find(i)[0] for i in indices]

    def fetch(self, i: int) -> None:
        """Fetches the tar that holds sample i into the cache, if there is one."""
        shard = self.shards[self._number(i)]
        if self.cache is not None and isinstance(shard.path, Url):
            self.cache.fetch(shard.path, self._size(shard))

    def shard_of(self, i: int) -> int:
        """The number of the shard that holds sample i."""
        return self._number(i)

    @staticmethod
    def _size(shard: Shard) -> int:
        return shard.path.size() if shard.size is None else shard.size

    def _shard(self, number: int) -> OpenShard:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            opening = self._opening.setdefault(number, threading.Lock())
        with opening:  # opening a remote tar doesn't block the readers of the others
            shard = self._open.get(number) or self._opened(number)
        with self._lock:
            if number not in self._open:
                if len(self._open) >= MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)  # unmapped when its last reader is done
                self._open[number] = shard
            self._opening.pop(number, None)
            return self._open[number]

    def _opened(self, number: int) -> OpenShard:
        path, listed = self.shards[number].path, self.shards[number].samples
        if isinstance(path, Url):
            size = self._size(self.shards[number])
            shard = OpenShard(path, size, local=None if self.cache is None else self.cache.fetch(path, size))
        else:
            shard = OpenShard(path)
        if (
            len(shard.samples) > listed and path not in self._looked_into
        ):  # with fewer, each missing sample is counted when it is read
            self.left_out.add("not_in_index", str(path), len(shard.samples) - listed)
            text = (
                f"{path} has {len(shard.samples)} samples, {INDEX} lists {listed}: the rest is left out; write the index again"
            )
            warnings.warn(printable(text), SkipWarning, stacklevel=2)
        return shard

    def read(self, i: int, decode: bool = True, shrink: Callable[[int, int], int] | None = None) -> Sample:
        """Sample i; without its image unless `decode`. shrink: decode the image with decode_reduced."""
        key, members, shard = self._find(i)
        content = shard.reader({k: m for k, m in members.items() if decode or k in (".json", ".txt")})
        captions, meta, refused = self._texts(i, key, members, shard, content)
        image: Any = None
        if decode:
            try:
                file = _image_bytes(i, key, members, content)
                if shrink is None:
                    image = decode_image(file, self.max_image_pixels)
                else:
                    image = decode_reduced(file, shrink, self.max_image_pixels)
            except ImageError as error:
                raise SampleError(Skip(i, key, error.reason, str(error))) from None
        return Sample(key, image, captions, meta, refused)

    def image_bytes(self, i: int) -> tuple[str, bytes]:
        """(key, the image file) of a sample. Raises SampleError if it has none."""
        key, members, shard = self._find(i)
        return key, _image_bytes(i, key, members, shard.content)

    def _number(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _find(self, i: int) -> tuple[str, dict[str, Member], OpenShard]:
        """A sample's key and files, and the shard that holds them."""
        number = self._number(i)
        place, shard = i - int(self._starts[number]), self._shard(number)
        if place >= len(shard.samples):
            raise SampleError(_missing(i, place, self.shards[number].path, shard))
        return *shard.samples[place], shard

    def _texts(
        self, i: int, key: str, members: dict[str, Member], shard: OpenShard, content: Callable[[Member], bytes]
    ) -> tuple[dict, dict, dict]:
        """(captions, metadata, fields that are not captions)."""
        captions: dict[str, str | tuple[str, ...]] = {}
        refused: dict[str, str] = {}
        meta: dict[str, Any] = {}
        if ".json" in members:
            try:
                record = json.loads(content(members[".json"]))
            except (ValueError, RecursionError) as error:
                raise SampleError(Skip(i, key, "broken_json", str(error))) from None
            if not isinstance(record, dict):
                raise SampleError(Skip(i, key, "broken_json", f"it holds {type(record).__name__}, not an object"))
            read_record(record, captions, refused)
            meta = {name: value for name, value in record.items() if name not in ("captions", "meta")}
            inner = record.get("meta")
            if isinstance(inner, dict):
                meta.update(inner)
            elif inner is not None:
                meta["meta"] = inner
        if ".txt" in members:
            read_captions({"txt": text_of_bytes(content(members[".txt"])).strip()}, captions, refused)
        read_captions(shard.captions.get(key, {}), captions, refused)
        return captions, meta, refused


def _image_bytes(i: int, key: str, members: dict[str, Member], content: Callable[[Member], bytes]) -> bytes:
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if suffix is None:
        raise SampleError(Skip(i, key, "missing_image", f"the tar has only {', '.join(members)}"))
    return content(members[suffix])


def _missing(i: int, place: int, path: Path, shard: OpenShard) -> Skip:
    """A sample that the index lists and the tar does not have."""
    key = f"{path.name}#{place}"
    if shard.cut is not None:
        return Skip(i, key, "truncated_tar", f"{path} ends before it")
    detail = (
        f"{INDEX} lists more samples than the {len(shard.samples)} of {path}: the files of a sample were not neighbours when"
    )
    return Skip(i, key, "unsorted_tar", f"{detail} it was counted, or the tar was changed; sort the tar, or run write_index")
