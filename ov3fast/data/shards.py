"""webdataset tar shards with random access: write them, read sample i, survive what is broken in them.

Shards are written by webdataset's TarWriter with a wids index (`index.json`), which gives the number of samples of each
shard without opening it, and are read through wids' memory-mapped tar reader (see indexed_tar.py).

A sample is a group of files with one stem: an image (`key.jpg`, or another of images.IMAGE_SUFFIXES), `key.txt` (caption "txt") and
`key.json`, whose text fields are captions by their names (img2dataset's layout), those under "captions" included; the
other fields are its metadata. Captions from `join_captions` are added when they lie beside the shard.
"""

from __future__ import annotations

import glob
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ov3fast.data.captions import sidecar
from ov3fast.data.images import IMAGE_SUFFIXES, ImageError, decode_image
from ov3fast.data.indexed_tar import OpenShard
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.skips import DataError, SampleError, Skip
from ov3fast.io import atomic_folder, atomic_write

if TYPE_CHECKING:
    from PIL import Image

INDEX = "index.json"
MAX_OPEN_SHARDS = 128


class Sample(NamedTuple):
    """One sample: image is a decoded Pillow image of mode RGB or RGBA (None if only the text was read)."""

    key: str
    image: Image.Image | None
    captions: dict[str, str]
    meta: dict[str, Any]


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    folder: str | Path,
    samples_per_shard: int = 1000,
    info: Mapping[str, Any] | None = None,
) -> int:
    """Write (key, {suffix: bytes}) samples as `<folder>/00000.tar`, ... with a wids index; returns their number.

    `info` goes into the index. The folder appears whole or not at all. A folder of an earlier call is replaced;
    FileExistsError names a file in it that no such call wrote.
    """
    from webdataset import TarWriter

    folder = Path(folder)
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
    """Names that an earlier write_shards left in the folder: its tars, by the index, and what was joined to them."""
    try:
        tars = [entry["url"] for entry in json.loads((folder / INDEX).read_text())["shardlist"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {*tars, *(sidecar(name).name for name in tars)}


def write_index(folder: str | Path) -> Path:
    """Count the samples of a folder's tars once and write them as a wids index, so that later starts need not look."""
    folder = Path(folder)
    shards = [{"url": shard.path.name, "nsamples": shard.samples} for shard in find_shards(sorted(folder.glob("*.tar")))]
    return _write_index(folder, shards, folder.name, {})


def _write_index(folder: Path, shards: list[dict[str, Any]], name: str, info: Mapping[str, Any]) -> Path:
    for shard in shards:
        shard["filesize"] = (folder / shard["url"]).stat().st_size
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": shards, "info": dict(info)}
    with atomic_write(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1))
    return folder / INDEX


# ---- reading a set ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A tar file and the number of samples that the index (or, without one, a look into the tar) gives it."""

    path: Path
    samples: int


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Shard]:
    """The tars of a folder (its `index.json` first), a glob pattern, a tar, a wids index file, or a list of these.

    Raises FileNotFoundError when a path is missing and DataError when a folder or a pattern holds no tar.
    """
    if not isinstance(shards, str | Path):
        found = [shard for item in shards for shard in find_shards(item)]
        if not found:
            raise DataError("shards: got an empty list; it takes tar files, folders or glob patterns")
        return found
    path = Path(shards)
    if glob.has_magic(str(shards)) and not path.exists():
        paths = sorted(glob.glob(str(shards)))
        if not paths:
            raise DataError(f"shards: no file matches {shards}")
        return [Shard(Path(p), _count(Path(p))) for p in paths]
    if not path.exists():
        raise FileNotFoundError(f"shards: there is no file or folder {path}")
    if path.is_dir() and (path / INDEX).exists():
        path = path / INDEX
    if path.suffix == ".json":
        entries = json.loads(path.read_text()).get("shardlist", [])
        found = [Shard(path.parent / entry["url"], int(entry["nsamples"])) for entry in entries]
        for shard in found:
            if not shard.path.exists():
                raise FileNotFoundError(f"shards: {path} lists {shard.path.name}, which is not there")
        if not found:
            raise DataError(f"shards: the index {path} lists no shard")
        return found
    if path.is_dir():
        paths = sorted(path.glob("*.tar"))
        if not paths:
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise DataError(f"shards: the folder {path} holds no .tar file (it holds {inside}); give a folder of tar shards")
        return [Shard(p, _count(p)) for p in paths]
    return [Shard(path, _count(path))]


def _count(path: Path) -> int:
    shard = OpenShard(path)
    shard.close()
    if shard.cut is not None and not shard.samples:
        raise DataError(f"shards: {path} holds no whole sample; it is no tar file or was cut at its start")
    return len(shard.samples)


class ShardDataset:
    """Random access to the samples of tar shards: `dataset[i] -> Sample`; it can be sent to worker processes.

    Reading raises SampleError with a named reason for a sample that must be skipped; see ov3fast.data.skips.
    """

    def __init__(self, shards: str | Path | Sequence[str | Path], max_image_pixels: int = MAX_IMAGE_PIXELS):
        self.shards = find_shards(shards)
        self.max_image_pixels = max_image_pixels
        self.lengths = [shard.samples for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        if not len(self):
            raise DataError(f"shards: there is no sample in {', '.join(str(s.path) for s in self.shards[:3])}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=OrderedDict(), _lock=threading.Lock())

    def locations(self) -> Iterator[tuple[int, int]]:
        """(shard number, sample number) of all samples."""
        for shard, length in enumerate(self.lengths):
            for i in range(length):
                yield shard, int(self._starts[shard]) + i

    def truncated(self) -> dict[Path, int]:
        """The shards that were cut short, with the number of samples known to be lost (by the index, or at least one)."""
        lost = {}
        for number, shard in enumerate(self.shards):
            opened = self._shard(number)
            missing = shard.samples - len(opened.samples)
            if missing > 0 or opened.cut is not None:
                lost[shard.path] = max(missing, 1)
        return lost

    def text(self, i: int) -> Sample:
        """The sample without its image."""
        return self._read(i, decode=False)

    def __getitem__(self, i: int) -> Sample:
        return self._read(i, decode=True)

    def _shard(self, number: int) -> OpenShard:
        with self._lock:
            if number not in self._open:
                if len(self._open) >= MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)  # unmapped with its last reader
                self._open[number] = OpenShard(self.shards[number].path)
            self._open.move_to_end(number)
            return self._open[number]

    def _read(self, i: int, decode: bool) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        place, shard = i - int(self._starts[number]), self._shard(number)
        path = self.shards[number].path
        if place >= len(shard.samples):
            raise SampleError(Skip(i, f"{path.name}#{place}", "truncated_tar", f"{path} ends before it"))
        key, members = shard.samples[place]
        captions, meta = self._texts(i, key, members, shard)
        image = None
        if decode:
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if suffix is None:
                raise SampleError(Skip(i, key, "missing_image", f"the tar has only {', '.join(members)}"))
            try:
                image = decode_image(shard.tar.content(members[suffix]), self.max_image_pixels)
            except ImageError as error:
                raise SampleError(Skip(i, key, error.reason, str(error))) from None
        return Sample(key, image, captions, meta)

    def _texts(self, i: int, key: str, members: dict[str, int], shard: OpenShard) -> tuple[dict, dict]:
        captions: dict[str, str] = {}
        meta: dict[str, Any] = {}
        try:
            if ".json" in members:
                record = json.loads(shard.tar.content(members[".json"]))
                if not isinstance(record, dict):
                    raise ValueError("is no object")
                captions.update({name: value for name, value in record.items() if isinstance(value, str)})
                captions.update(record.get("captions") or {})
                meta = {**{k: v for k, v in record.items() if k not in ("captions", "meta")}, **(record.get("meta") or {})}
            if ".txt" in members:
                captions["txt"] = shard.tar.content(members[".txt"]).decode().strip()
        except (ValueError, TypeError) as error:
            raise SampleError(Skip(i, key, "broken_json", str(error))) from None
        captions.update(shard.captions.get(key, {}))
        return captions, meta
