"""Read members out of package files, without installing or importing the package.

`members(path, wanted)` streams (name, bytes) from a wheel (zip), an npm or source tarball (.tgz, .tar.gz) or a Debian
package (.deb: an `ar` archive around `data.tar.xz`). `rcc_files(data)` walks a Qt resource bundle (.rcc).
"""

from __future__ import annotations

import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def members(path: str | Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the regular files whose name passes `wanted`, in archive order.

    Names are those inside the archive, without a leading "./". Raises ValueError on an unknown kind of archive.
    """
    path = Path(path)
    if path.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/") and wanted(name):
                    yield name, archive.read(name)
    elif path.name.endswith((".tgz", ".tar.gz")):
        with tarfile.open(path, "r|gz") as archive:
            yield from _tar_members(archive, wanted)
    elif path.name.endswith(".deb"):
        with open(path, "rb") as file, lzma.open(_deb_data(file, path)) as data, tarfile.open(fileobj=data, mode="r|") as tar:
            yield from _tar_members(tar, wanted)
    else:
        raise ValueError(f"path: {path.name} is none of .whl, .zip, .tgz, .tar.gz, .deb")


def _tar_members(archive: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for info in archive:
        name = info.name.removeprefix("./")
        if info.isfile() and wanted(name):
            yield name, archive.extractfile(info).read()


class _Window(io.RawIOBase):
    """A read-only view of `size` bytes of `file` from `start`."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.position, self.end = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.file.seek(self.position)
        data = self.file.read(min(len(buffer), self.end - self.position))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _deb_data(file: BinaryIO, path: Path) -> io.BufferedReader:
    if file.read(8) != b"!<arch>\n":
        raise ValueError(f"path: {path.name} is not a Debian package (no ar header)")
    while header := file.read(60):
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name == "data.tar.xz":
            return io.BufferedReader(_Window(file, file.tell(), size), 1 << 20)
        if name.startswith("data.tar"):
            raise ValueError(f"path: {path.name} holds {name}; only data.tar.xz is read")
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"path: {path.name} holds no data.tar.xz")


def rcc_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every file of a Qt resource bundle, depth first. All its integers are big-endian.

    Header: "qres", version, then the offsets of tree, data and names. A tree entry is name offset (4), flags (2), then for a
    directory (flag 2) child count and first child, for a file locale (4) and data offset (4); from version 2 on it ends
    with a time stamp (8). A name is its length in UTF-16 units (2), a hash (4), and the text. A file is its length (4) and
    the payload; with flag 1 the payload is 4 bytes of length and a zlib stream. Source: Qt's rcc tool, formats 1 to 3.
    """
    if data[:4] != b"qres":
        raise ValueError("data: not a Qt resource bundle (no 'qres' header)")
    version, tree, payload, names = struct.unpack_from(">4I", data, 4)
    entry_size = 14 if version == 1 else 22

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        start = names + offset + 6
        return data[start : start + 2 * length].decode("utf-16-be")

    def walk(index: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name_offset, flags, first, second = struct.unpack_from(">IHII", data, tree + index * entry_size)
        path = parent if index == 0 else f"{parent}/{name_at(name_offset)}"
        if flags & 2:
            count, child = first, second
            for i in range(child, child + count):
                yield from walk(i, path)
            return
        (size,) = struct.unpack_from(">I", data, payload + second)
        start = payload + second + 4
        content = data[start : start + size]
        if flags & ~1:
            raise ValueError(f"data: {path} has the unknown resource flags {flags:#x}")
        yield path, zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")
