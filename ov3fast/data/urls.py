"""Files behind URLs (s3://, gs://, hf://, https://, ...), read through fsspec: ranges with retries, and a bounded local cache.

Url("s3://bucket/shards/00000.tar").read(512, 1024)
LocalCache("/scratch/shards", gib=200).fetch(url) -> a local path
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ov3fast.data.skips import DataError
from ov3fast.io import atomic_write

T = TypeVar("T")

ATTEMPTS = 6
FIRST_DELAY_S = 0.2
"""Before the second attempt; doubled for each further one."""
CHUNK = 2**24
"""Bytes per request when a whole file is fetched."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_url(item: object) -> bool:
    return isinstance(item, Url) or "://" in str(item)


class Url:
    """A file or folder behind a URL, with as much of pathlib.Path as shards need.

    Failed reads are retried; after ATTEMPTS, DataError names the URL and the last failure.
    """

    def __init__(self, url: str | Url) -> None:
        self.url = str(url).rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Url({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> Url:
        return Url(self.url.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> Url:
        return self.parent / (Path(self.name).stem + suffix)

    def exists(self) -> bool:
        return self._retried(lambda fs, path: fs.exists(path))

    def names(self) -> list[str]:
        """The names of the files in this folder, sorted."""
        return sorted(
            str(name).rstrip("/").rpartition("/")[2] for name in self._retried(lambda fs, path: fs.ls(path, detail=False))
        )

    def size(self) -> int:
        return int(self._retried(lambda fs, path: fs.info(path))["size"])

    def read_bytes(self) -> bytes:
        return self._retried(lambda fs, path: fs.cat_file(path))

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end)."""
        if end <= start:
            return b""

        def whole(fs: Any, path: str) -> bytes:
            content = fs.cat_file(path, start=start, end=end)
            if len(content) != end - start:
                raise OSError(f"got {len(content)} of {end - start} bytes")
            return content

        return self._retried(whole)

    def write_bytes(self, content: bytes) -> None:
        self._retried(lambda fs, path: fs.pipe_file(path, content))

    def _retried(self, act: Callable[[Any, str], T]) -> T:
        fs, path = self._opened()
        for attempt in range(ATTEMPTS):
            try:
                return act(fs, path)
            except _FINAL:
                raise FileNotFoundError(f"{self.url} doesn't exist, or reading it is not permitted") from None
            except Exception as error:  # each store has errors of its own
                last = error
                if attempt < ATTEMPTS - 1:
                    time.sleep(FIRST_DELAY_S * 2**attempt)
        raise DataError(f"{self.url} can't be read after {ATTEMPTS} attempts: {type(last).__name__}: {last}")

    def _opened(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{self.url} is read through fsspec: pip install 'ov3fast[data]'", name="fsspec"
            ) from None
        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # unknown protocol, or its package is missing
            raise DataError(f"{self.url} can't be opened: {error}") from None


class LocalCache:
    """Whole files in a local folder, at most `gib` GiB of them; the least recently used are removed first.

    Several processes may share the folder. A file that is open stays readable after it was removed.
    """

    def __init__(self, folder: str | Path, gib: float) -> None:
        self.folder, self.limit = Path(folder).expanduser(), int(gib * 2**30)

    def fetch(self, url: Url, size: int) -> Path:
        """The local copy of a file of `size` bytes, fetched if it isn't cached. DataError if the cache is too small for it."""
        if size > self.limit:
            raise DataError(
                f"cache_gib: {url} has {size / 2**30:.2f} GiB, the cache only {self.limit / 2**30:.2f}; raise data.cache_gib"
            )
        path = self.folder / f"{hashlib.sha256(f'{url} {size}'.encode()).hexdigest()[:20]}-{url.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._touched(path):
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be fetching it
                if not self._touched(path):
                    with open(self.folder / "making-room.lock", "w") as room:
                        fcntl.flock(room, fcntl.LOCK_EX)
                        self._make_room(size)
                    with atomic_write(path) as temporary, open(temporary, "wb") as file:
                        for start in range(0, size, CHUNK):
                            file.write(url.read(start, min(start + CHUNK, size)))
        return path

    @staticmethod
    def _touched(path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        kept = []
        for path in self.folder.iterdir():
            if path.suffix != ".lock":
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # another process removed it
                kept.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, bytes_, path in sorted(kept):
            if total + size <= self.limit:
                break
            if not path.name.startswith("."):  # those are being written
                path.unlink(missing_ok=True)
                total -= bytes_
