"""One tar shard, memory-mapped: its samples by number, up to where it was cut short.

This is wids' reader (MMIndexedTar) with another index. wids' own stops with a traceback at a tar that was cut short, and reads
short ustar names only (no prefix, pax or GNU long names); this one keeps the samples before the cut and says where it was.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

from ov3fast.data.captions import sidecar


@lru_cache
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
                    if header[257:265] == b"ustar\x0000" and header[345]:
                        name = header[345:500].rstrip(b"\0").decode() + "/" + name
                    start = offset + 512
                    if start + size > end:
                        self.cut = long_name or name
                        return
                    if kind == b"L":  # GNU: the content is the next member's name
                        long_name = data[start : start + size].rstrip(b"\0").decode()
                    elif kind == b"x":  # pax: the content may hold the next member's name
                        long_name = _pax_path(data[start : start + size])
                    else:
                        if kind in (b"0", b"\0"):
                            self.by_index.append((long_name or name, start, size))
                        long_name = None
                except ValueError:
                    self.cut = ""
                    return
                offset = start + (size + 511) // 512 * 512

        def names(self):
            return [name for name, _, _ in self.by_index]

        def content(self, index: int) -> bytes:
            _, start, size = self.by_index[index]
            return self.mmapped_file[start : start + size]

    return Tar


def _pax_path(records: bytes) -> str | None:
    """The path in a pax header: records "length key=value\\n"."""
    while records:
        length = int(records[: records.index(b" ")])
        key, _, value = records[records.index(b" ") + 1 : length - 1].partition(b"=")
        if key == b"path":
            return value.decode()
        records = records[length:]
    return None


class OpenShard:
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
            if self.cut is not None and self.samples:
                (_, first), (key, last) = self.samples[0], self.samples[-1]
                if set(last) < set(first) or ("." in self.cut and key == splitname(self.cut)[0]):
                    self.samples.pop()  # the cut went through this sample
        joined = sidecar(path)
        self.captions = json.loads(joined.read_text(encoding="utf-8")) if joined.exists() else {}

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
