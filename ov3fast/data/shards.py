"""webdataset tar shards with random access: write them, read sample i, survive what is broken in them.

Shards are written by webdataset's TarWriter with a wids index (`index.json`), and read through wids' memory-mapped tar
reader. Two things of it are replaced here: it stops with a traceback at a tar that was cut short, and it reads short ustar
names only (no prefix, pax or GNU long names). Here the samples before the cut are kept and the rest are counted.

A sample is a group of files with one stem: an image (`key.jpg`, .jpeg, .png, .webp), `key.txt` (caption "txt") and
`key.json`, whose text fields are captions by their names (img2dataset's layout), those under "captions" included; the
other fields are its metadata. Captions from `join_captions` are added when they lie beside the shard.
"""

from __future__ import annotations

import glob
import io
import json
import os
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ov3fast.data.captions import sidecar
from ov3fast.data.config import MAX_IMAGE_PIXELS
from ov3fast.data.skips import DataError, SampleError, Skip

if TYPE_CHECKING:
    from PIL import Image

INDEX = "index.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

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

    `info` goes into the index. The folder appears whole or not at all: all is written beside it and renamed; an older
    folder is replaced.
    """
    from webdataset import TarWriter

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    shards: list[dict[str, Any]] = []
    keys: set[str] = set()
    writer = None
    try:
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
        for shard in shards:
            shard["filesize"] = (temporary / shard["url"]).stat().st_size
        index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": folder.name, "shardlist": shards}
        index["info"] = dict(info or {})
        (temporary / INDEX).write_text(json.dumps(index, indent=1))
        os.chmod(temporary, 0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(shard["nsamples"] for shard in shards)


# ---- reading one tar -------------------------------------------------------------------------------------------------


def _tar_reader():
    """wids' reader with an index that stops at a cut and knows long names (a function, to import wids late)."""
    from wids.wids_mmtar import MMIndexedTar

    class Tar(MMIndexedTar):
        def _build_index(self):
            self.by_index: list[tuple[str, int, int]] = []  # name, start of the content, size
            self.cut: str | None = None  # where the tar was cut short: the member's name, or "" between members
            data, end, offset, long_name = self.mmapped_file, len(self.mmapped_file), 0, None
            while True:
                header = data[offset : offset + 512]
                if len(header) == 512 and not header.strip(b"\0"):
                    return  # the end-of-archive block
                try:
                    if len(header) < 512:
                        raise ValueError("cut inside a header")
                    size, kind = int(header[124:136].strip(b"\0 ") or b"0", 8), header[156:157]
                    name = header[:100].rstrip(b"\0").decode()
                    if header[257:262] == b"ustar" and header[345] and header[263:265] == b"00":
                        name = header[345:500].rstrip(b"\0").decode() + "/" + name
                except ValueError:
                    self.cut = ""
                    return
                start = offset + 512
                if start + size > end:
                    self.cut = long_name or name
                    return
                if kind == b"L":  # GNU: the content is the next member's name
                    long_name = data[start : start + size].rstrip(b"\0").decode()
                elif kind == b"x":  # pax: records "length key=value\n"; only the path matters
                    long_name = _pax_path(data[start : start + size])
                else:
                    if kind in (b"0", b"\0"):
                        self.by_index.append((long_name or name, start, size))
                    long_name = None
                offset = start + (size + 511) // 512 * 512

        def names(self):
            return [name for name, _, _ in self.by_index]

        def content(self, index: int) -> bytes:
            _, start, size = self.by_index[index]
            return self.mmapped_file[start : start + size]

    return Tar


def _pax_path(records: bytes) -> str | None:
    while records:
        length = int(records[: records.index(b" ")])
        key, _, value = records[records.index(b" ") + 1 : length - 1].partition(b"=")
        if key == b"path":
            return value.decode()
        records = records[length:]
    return None


class _OpenShard:
    """A memory-mapped tar, its files grouped into samples: (key, {suffix: member number})."""

    def __init__(self, path: Path):
        from wids.wids import group_by_key, splitname

        self.samples: list[tuple[str, dict[str, int]]] = []
        self.tar, self.cut = None, ""
        if path.stat().st_size:
            self.tar = _tar_reader()(str(path))
            self.cut = self.tar.cut
            names = self.tar.names()
            numbers = [i for i, name in enumerate(names) if "." in os.path.basename(name)]
            for group in group_by_key([names[i] for i in numbers]):
                members = [numbers[i] for i in group]
                key = splitname(names[members[0]])[0]
                self.samples.append((key, {splitname(names[i])[1].lower(): i for i in members}))
            if self.cut and self.samples and self.samples[-1][0] == splitname(self.cut)[0]:
                self.samples.pop()  # the cut went through this sample
        joined = sidecar(path)
        self.captions = json.loads(joined.read_text(encoding="utf-8")) if joined.exists() else {}

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()


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
    shard = _OpenShard(path)
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
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        if not len(self):
            raise DataError(f"shards: there is no sample in {', '.join(str(s.path) for s in self.shards[:3])}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

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

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = _OpenShard(self.shards[number].path)
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

    def _texts(self, i: int, key: str, members: dict[str, int], shard: _OpenShard) -> tuple[dict, dict]:
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


# ---- images ----------------------------------------------------------------------------------------------------------


class ImageError(ValueError):
    """An image that can't be decoded; `reason` is "broken_image", "truncated_image" or "too_large"."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def decode_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode to a loaded Pillow image, RGBA if it has transparency, else RGB. The size is checked before decoding."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_image_pixels:
            raise ImageError("too_large", f"{image.width}x{image.height} pixels, the limit is {max_image_pixels}")
        image.load()
        transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
        return image.convert("RGBA" if transparent else "RGB")
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's codecs raise OSError, SyntaxError, struct.error, EOFError and others on bad bytes
        reason = "truncated_image" if "truncated" in str(error).lower() else "broken_image"
        raise ImageError(reason, f"{type(error).__name__}: {error}") from None
