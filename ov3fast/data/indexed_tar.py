"""One tar shard, memory-mapped, its files grouped into samples: random access to sample i, up to where it was cut short.

A sample is what has one key: the path up to the first dot of the file name, as in webdataset. Its files need not be
neighbours, since the whole tar is looked through when it is opened.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from ov3fast.data.captions import sidecar
from ov3fast.data.skips import DataError
from ov3fast.data.tar_members import Contents, Member, read_contents

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix in lower case) of a member: "a/b.seg.PNG" -> ("a/b", ".seg.png"). None where either would be empty."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return (folder + slash + stem, dot + suffix.lower()) if stem and suffix else None


class OpenShard:
    """A memory-mapped tar; any file can be opened, and what is wrong with it is noted.

    samples: (key, {suffix: member}) in the order of their first members.
    cut: where the tar was cut short, None if it is whole; lost: samples known to be lost to the cut.
    left_out: members that belong to no sample, by reason (see tar_members.Contents; name_without_suffix, duplicate_member).
    problem: the reason's name and details where nothing can be read, else None.
    captions: what `join_captions` left beside the tar, key -> {name: text}.
    """

    def __init__(self, path: Path):
        self._data: mmap.mmap | bytes = b""
        if path.stat().st_size:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        contents = read_contents(self._data)
        self.cut, self.left_out, self.lost = contents.cut, contents.left_out, 0
        samples = self._group(contents)
        self._drop_cut_sample(samples)
        self.samples = list(samples.items())
        self.captions = _joined(path)
        self.problem = self._problem() if self.cut is not None and not self.samples else None

    def content(self, member: Member) -> bytes:
        return self._data[member.start : member.start + member.size]

    def close(self) -> None:
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def _problem(self) -> str:
        if not self._data:
            return "empty_file: it has no bytes"
        head = bytes(self._data[:6])
        kind = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
        if kind:
            return f"compressed_tar: it is compressed by {kind}; unpack it, since samples are read at random"
        return "no_tar: it is no tar file or was cut at its start"

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
        """A sample that the truncation hit counts as lost, not as one without a caption."""
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


def _joined(path: Path) -> dict:
    """Captions that `join_captions` left beside the shard: key -> {name: text}."""
    file = sidecar(path)
    if not file.exists():
        return {}
    try:
        joined = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(joined, dict) or not all(isinstance(captions, dict) for captions in joined.values()):
            raise ValueError("it is no object of objects")
    except ValueError as error:
        raise DataError(f"captions: {file} can't be read ({error}); join the captions again, or delete it") from None
    return joined
