"""One tar shard, its files grouped into samples: random access to sample i, also in a truncated tar.

The files of a sample share a key: the path up to the first dot of the file name, as in webdataset. They need not be
adjacent, since the whole tar is scanned when it is opened, unless it has an index: see tar_index. A local tar is
memory-mapped; from a tar behind a URL, the bytes of a sample are fetched when it is read.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

from ov3fast.data import tar_index
from ov3fast.data.captions import sidecar
from ov3fast.data.skips import DataError
from ov3fast.data.tar_members import BLOCK, Contents, Member, read_contents
from ov3fast.data.urls import Url

GAP = 1 << 16
"""Unneeded bytes between the files of a sample that may be fetched with them in one request."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix in lower case) of a member: "a/b.seg.PNG" -> ("a/b", ".seg.png"). None if either would be empty."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return (folder + slash + stem, dot + suffix.lower()) if stem and suffix else None


class OpenShard:
    """A tar. Opening never fails for bad content; what is wrong with it is recorded. local: a local copy of a tar behind a URL.
    use_index=False scans it even if it has an index.

    samples: (key, {suffix: member}) in the order of their first members.
    cut: where the tar was truncated, None if it is complete; lost: samples known to be lost to the truncation.
    left_out: members that belong to no sample, by reason (see tar_members.Contents; name_without_suffix, duplicate_member).
    problem: the reason's name and details if nothing can be read, else None.
    captions: those that `join_captions` wrote beside the tar, key -> {name: text}.
    """

    def __init__(self, path: Path | Url, size: int | None = None, local: Path | None = None, use_index: bool = True):
        self._data: mmap.mmap | bytes | _Remote = b""
        if isinstance(path, Url) and local is None:
            self._data = _Remote(path, path.size() if size is None else size)
        elif (local or path).stat().st_size:
            with open(local or path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.samples: Sequence[tuple[str, dict[str, Member]]]
        content = tar_index.read(path) if use_index else None
        known = None if content is None else tar_index.unpack(content, len(self._data), self.head())
        if known is not None:
            self.samples, self.cut, self.left_out, self.lost = known
        else:
            self._look_through()
        self.captions = _joined(path)
        self.problem = self._problem() if self.cut is not None and not len(self.samples) else None

    def _look_through(self) -> None:
        contents = read_contents(_Pieces(self._data) if isinstance(self._data, _Remote) else self._data)
        self.cut, self.left_out, self.lost = contents.cut, contents.left_out, 0
        samples = self._group(contents)
        self._drop_cut_sample(samples)
        self.samples = list(samples.items())

    def head(self) -> bytes:
        """The first block."""
        return bytes(self._data[:BLOCK])

    @property
    def size(self) -> int:
        return len(self._data)

    def content(self, member: Member) -> bytes:
        return self._data[member.start : member.start + member.size]

    def reader(self, files: dict[str, Member]) -> Callable[[Member], bytes]:
        """`content` for a set of one sample's files, which are fetched from a URL with one request."""
        if not isinstance(self._data, _Remote):
            return self.content
        start, end = min(m.start for m in files.values()), max(m.start + m.size for m in files.values())
        if end - start > sum(m.size for m in files.values()) + GAP:
            return self.content
        span = self._data[start:end]
        return lambda member: span[member.start - start : member.start - start + member.size]

    def close(self) -> None:
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def _problem(self) -> str:
        if not self._data:
            return "empty_file: it has no bytes"
        head = bytes(self._data[:6])
        kind = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
        if kind:
            return f"compressed_tar: it is compressed with {kind}; decompress it, since samples need random access"
        return "no_tar: it is not a tar file, or was truncated at its start"

    def _group(self, contents: Contents) -> dict[str, dict[str, Member]]:
        samples: dict[str, dict[str, Member]] = {}
        for member in contents.members:
            split = split_name(member.name)
            if split is None:
                self.left_out.add("name_without_suffix", member.name)
                continue
            files = samples.setdefault(split[0], {})
            if split[1] in files:  # as tar extracts it: the last one stays
                self.left_out.add("duplicate_member", member.name)
            files[split[1]] = member
        return samples

    def _drop_cut_sample(self, samples: dict[str, dict[str, Member]]) -> None:
        """The sample at the truncation counts as lost, not as a sample without a caption."""
        if self.cut is None:
            return
        split = split_name(self.cut)
        if split is not None:
            samples.pop(split[0], None)
        elif samples:
            first, last = next(iter(samples)), next(reversed(samples))
            if samples[last].keys() < samples[first].keys():
                samples.pop(last)
        self.lost = 1


class _Remote:
    """A file behind a URL as bytes that can be sliced."""

    def __init__(self, url: Url, size: int):
        self.url, self.size = url, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: slice) -> bytes:
        start, end, _ = place.indices(self.size)
        return self.url.read(start, end)


class _Pieces:
    """The same for scanning headers: small reads are served from larger pieces."""

    PIECE = 1 << 20

    def __init__(self, remote: _Remote):
        self._remote, self._first, self._piece = remote, 0, b""

    def __len__(self) -> int:
        return len(self._remote)

    def __getitem__(self, place: slice | int) -> bytes | int:
        if isinstance(place, int):
            return self[place : place + 1][0]
        start, end, _ = place.indices(len(self))
        if not self._first <= start <= end <= self._first + len(self._piece):
            self._first, self._piece = start, self._remote[start : max(end, start + self.PIECE)]
        return self._piece[start - self._first : end - self._first]


def _joined(path: Path | Url) -> dict:
    """Captions that `join_captions` left beside the shard: key -> {name: text}."""
    file = path.with_suffix(".captions.json") if isinstance(path, Url) else sidecar(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        joined = json.loads(content.decode("utf-8"))
        if not isinstance(joined, dict) or not all(isinstance(captions, dict) for captions in joined.values()):
            raise ValueError("it is not an object of objects")
    except ValueError as error:
        raise DataError(f"captions: {file} can't be read ({error}); join the captions again, or delete it") from None
    return joined
