"""Image files: finding them, and cropping them without resizing."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ov3fast.data.images import IMAGE_SUFFIXES
from ov3fast.data.tar_members import is_foreign
from ov3fast.data.transforms import premultiplied, to_tensor

if TYPE_CHECKING:
    from PIL import Image


class FoundImages(dict[str, Path]):
    """Name -> file. left_out: suffix -> number of files in the given folders that are not images by their suffix."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: Counter[str] = Counter()

    def warn_of_left_out(self) -> None:
        """Warns once if files were left out."""
        if self.left_out:
            counts = ", ".join(f"{count} {suffix or 'without one'}" for suffix, count in sorted(self.left_out.items()))
            message = f"left out {self.left_out.total()} files that are not images by their suffix ({counts})"
            warnings.warn(message, stacklevel=5)


def find_images(paths: str | Path | Sequence[str | Path]) -> FoundImages:
    """Name -> file of the images in files and folders, in the given order, each folder's sorted by name.

    Subfolders are searched, symlinked ones too; files that an operating system adds (._*, .DS_Store, __MACOSX/) are ignored. A name is the path
    below its folder, or the file's own name; if two would be equal, the full path. FileNotFoundError for a missing path or
    a folder without images, ValueError for a file that is not an image by its suffix.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("images: got no paths; it takes image files or folders")
    images = FoundImages()
    found: list[tuple[str, Path]] = []
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            files = _files_in(path)
            inside = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"images: the folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            images.left_out.update(file.suffix.lower() for file in files if file.suffix.lower() not in IMAGE_SUFFIXES)
            found += [(file.relative_to(path).as_posix(), file) for file in inside]
        elif not path.is_file():
            raise FileNotFoundError(f"images: there is no file or folder {path}")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"images: {path} is not an image by its suffix; it takes {', '.join(IMAGE_SUFFIXES)}")
        else:
            found.append((path.name, path))
    uses = Counter(name for name, _ in found)
    images.update({file.as_posix() if uses[name] > 1 else name: file for name, file in found})
    return images


def _files_in(folder: Path, above: tuple[str, ...] = ()) -> list[Path]:
    """All files below, following symlinks except those that lead back to a folder above."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    files = []
    for entry in folder.iterdir():
        if is_foreign(entry.name) or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            files += _files_in(entry, (*above, real))
        elif entry.is_file() or not entry.exists():  # a dangling link is reported when it is read
            files.append(entry)
    return files


def cropped(image: Image.Image, multiple: int) -> Tensor:
    """float32 [3, H, W] in [-1, 1]: on white, not resized; the centre with the largest sides that are multiples of `multiple`."""
    width, height = (side // multiple * multiple for side in image.size)
    if not width or not height:
        raise ValueError(
            f"image: its sides must be at least {multiple} pixels to keep its size, got {image.width} x {image.height}; set a size"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    region = premultiplied(image).crop((left, top, left + width, top + height))
    return to_tensor(np.array(region)[None])[0]
