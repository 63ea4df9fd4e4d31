"""A tar's index, stored beside it as `00000.index`: the offset of every file of every sample, so that opening the tar reads none of it.

    members     starts (in blocks of 512 bytes) and sizes, sample by sample, in the order of the tar
    samples     the number of members of each, and their keys

As a safetensors file it is read in a millisecond; it takes about 9 bytes per file and 4 per sample, plus the keys. It is valid for
a tar of the same size with the same first header.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ov3fast.data.skips import Tally
from ov3fast.data.tar_members import BLOCK, Member
from ov3fast.io import atomic_write

SUFFIX = ".index"
FORMAT = 1


class Samples(Sequence):
    """(key, {suffix: Member}) of each sample, built on access."""

    def __init__(self, arrays: dict[str, np.ndarray], suffixes: list[str]) -> None:
        self._starts, self._sizes, self._suffix = arrays["starts"], arrays["sizes"], arrays["suffix"]
        self._first = np.concatenate([[0], np.cumsum(arrays["members"], dtype=np.int64)])
        self._key_ends = np.concatenate([[0], np.cumsum(arrays["key_lengths"], dtype=np.int64)])
        self._keys, self._suffixes = arrays["keys"].tobytes(), suffixes

    def __len__(self) -> int:
        return len(self._first) - 1

    def key(self, i: int) -> str:
        return self._keys[self._key_ends[i] : self._key_ends[i + 1]].decode("utf-8", "surrogateescape")

    def __getitem__(self, i: int) -> tuple[str, dict[str, Member]]:  # type: ignore[override]
        key, files = self.key(i), {}
        for m in range(int(self._first[i]), int(self._first[i + 1])):
            suffix = self._suffixes[int(self._suffix[m])]
            files[suffix] = Member(key + suffix, int(self._starts[m]) * BLOCK, int(self._sizes[m]))
        return key, files

    def __iter__(self) -> Iterator[tuple[str, dict[str, Member]]]:
        return (self[i] for i in range(len(self)))


def pack(shard: Any, size: int, head: bytes) -> bytes:
    """The index of an OpenShard that was walked; size and head: the tar's bytes and its first block."""
    from safetensors.numpy import save

    suffixes: dict[str, int] = {}
    starts, sizes, suffix, members, keys = [], [], [], [], []
    for key, files in shard.samples:
        keys.append(key.encode("utf-8", "surrogateescape"))
        members.append(len(files))
        for name, member in files.items():
            starts.append(member.start // BLOCK)
            sizes.append(member.size)
            suffix.append(suffixes.setdefault(name, len(suffixes)))
    arrays = {
        "starts": _narrow(starts), "sizes": _narrow(sizes), "suffix": _narrow(suffix), "members": _narrow(members),
        "key_lengths": _narrow([len(key) for key in keys]), "keys": np.frombuffer(b"".join(keys), np.uint8),
    }  # fmt: skip
    about = {
        "format": FORMAT, "size": size, "head": zlib.crc32(head), "suffixes": list(suffixes), "cut": shard.cut, "lost": shard.lost,
        "counts": dict(shard.left_out.counts), "examples": shard.left_out.examples,
    }  # fmt: skip
    return save(arrays, {"about": json.dumps(about)})


def unpack(content: bytes, size: int, head: bytes) -> tuple[Samples, str | None, Tally, int] | None:
    """(samples, cut, left_out, lost) as in OpenShard; None if the index is damaged or belongs to another tar."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        length = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["about"])
        if about["format"] != FORMAT or about["size"] != size or about["head"] != zlib.crc32(head):
            return None
        return (
            Samples(load(content), about["suffixes"]), about["cut"],
            Tally(Counter(about["counts"]), about["examples"]), about["lost"],
        )  # fmt: skip
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def count(content: bytes) -> tuple[int, int] | None:
    """(samples, the tar's size) according to an index; None if it is damaged."""
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        return int(header["members"]["shape"][0]), int(json.loads(header["__metadata__"]["about"])["size"])
    except (ValueError, KeyError, TypeError):
        return None


def write(path: Any, content: bytes) -> None:
    """Written beside the tar at `path`, a Path or a Url."""
    target = path.with_suffix(SUFFIX)
    if isinstance(target, Path):
        with atomic_write(target) as temporary:
            temporary.write_bytes(content)
    else:
        target.write_bytes(content)


def read(path: Any) -> bytes | None:
    """The index file beside the tar at `path`; None if there is none."""
    try:
        return path.with_suffix(SUFFIX).read_bytes()
    except FileNotFoundError:
        return None


def _narrow(values: list[int]) -> np.ndarray:
    """As an array of the narrowest unsigned type that holds them."""
    array = np.array(values, np.uint64)
    return array.astype(np.min_scalar_type(int(array.max()) if len(array) else 0))
