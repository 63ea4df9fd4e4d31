"""The inputs of bulk encoding: image files, or samples of tar shards, by number, in any process."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov3fast.data.images import IMAGE_SUFFIXES, ImageError
from ov3fast.data.skips import SampleError
from ov3fast.data.urls import is_url
from ov3fast.inference.images import find_images

if TYPE_CHECKING:
    from PIL import Image

    from ov3fast.data.shards import ShardDataset


@dataclass(frozen=True)
class ImageFiles:
    """Files with their names."""

    names: tuple[str, ...]
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.names)

    def items(self, start: int, stop: int) -> dict[str, Any]:
        """Name -> file."""
        return dict(zip(self.names[start:stop], self.paths[start:stop], strict=True))

    def fingerprint(self) -> str:
        """Changes with the files' names, sizes and times."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            try:
                found = path.stat()
                facts = (found.st_size, found.st_mtime_ns)
            except OSError:
                facts = (0, 0)
            digest.update(os.fsencode(name) + repr(facts).encode() + b"\0")
        return digest.hexdigest()


class Shards:
    """Samples of tar shards; a name is `tar/key`."""

    def __init__(self, shards: Sequence[str | Path], dataset: ShardDataset | None = None) -> None:
        from ov3fast.data.shards import ShardDataset

        self.dataset = ShardDataset(list(shards)) if dataset is None else dataset
        self._tars = [place for place, _ in self.dataset.locations()]

    def __len__(self) -> int:
        return len(self.dataset)

    def items(self, start: int, stop: int) -> dict[str, Callable[[], Image.Image]]:
        """Name -> a function that reads the image."""
        return {self._name(i): _Reader(self.dataset, i) for i in range(start, stop)}

    def fingerprint(self) -> str:
        """Changes with the tars' names, sizes, times and number of samples."""
        digest = hashlib.sha256()
        for shard in self.dataset.shards:
            digest.update(repr(shard.stamp()).encode())
        return digest.hexdigest()

    def _name(self, i: int) -> str:
        tar = self.dataset.shards[self._tars[i]].path.name
        try:
            [key] = self.dataset.keys([i])
        except SampleError:
            key = f"sample {i}"
        return f"{tar}/{key}"


@dataclass(frozen=True)
class _Reader:
    dataset: ShardDataset
    number: int

    def __call__(self) -> Image.Image:
        try:
            image = self.dataset[self.number].image
        except SampleError as error:
            raise ImageError(error.skip.reason, error.skip.detail) from None
        assert image is not None
        return image


Sources = ImageFiles | Shards


def find(given: Sequence[str | Path], lines: Sequence[str] = ()) -> Sources:
    """Image files, folders of images, patterns of image files (`photos/**/*.jpg`), or tar shards: tars, folders of tars, patterns of tars.

    lines: paths in place of "-" in `given`. FileNotFoundError or ValueError names what is missing or invalid.
    """
    paths = [path for one in given for path in (_listed(lines) if str(one) == "-" else _expanded(one))]
    if not paths:
        raise ValueError(
            "images: got no paths; it takes image files, folders, patterns, tar shards, or - for paths on standard input"
        )
    tars = [path for path in paths if _holds_shards(path)]
    if tars and len(tars) < len(paths):
        other = next(path for path in paths if path not in tars)
        raise ValueError(f"images: it takes tar shards or images, not both; got {tars[0]} and {other}")
    if tars:
        return Shards(tars)
    found = find_images(paths)
    found.warn_of_left_out()
    return ImageFiles(tuple(found), tuple(found.values()))


def _expanded(one: str | Path) -> list[str | Path]:
    """A pattern's files in order; anything else unchanged."""
    path = Path(one).expanduser()
    text = str(path)
    if path.exists() or is_url(one) or not glob.has_magic(text) or re.search(r"\{.*\}", text):
        return [one]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise FileNotFoundError(f"images: no file matches {text}")
    files = [Path(name) for name in found if Path(name).suffix.lower() in (*IMAGE_SUFFIXES, ".tar")]
    if not files and not any(Path(name).is_dir() for name in found):
        raise ValueError(f"images: {text} matches {len(found)} files, none of which is an image or a tar by its suffix")
    return list(files) or [Path(name) for name in found]


def _listed(lines: Sequence[str]) -> list[str | Path]:
    return [Path(line) for line in lines if line]


def _holds_shards(path: str | Path) -> bool:
    text = str(path)
    if text.endswith((".tar", "index.json")) or is_url(path) or re.search(r"\{.*\}", text):
        return True
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(".tar") and entry.is_file() for entry in entries)
