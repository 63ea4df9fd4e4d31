"""Image files: finding them, reading them upright, and bringing them to a size that the model takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ov3fast.data.images import decode_image
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.transforms import center_boxes, crop_resize, premultiplied, to_tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(paths: str | Path | Sequence[str | Path]) -> dict[str, Path]:
    """Name -> file of the images in files and folders (with the folders within), in the order given, a folder's sorted by name.

    A name is the path below its folder, or the file's own name; the path as found where two would be the same. FileNotFoundError for
    a missing path or a folder without images, ValueError for a file that is no image by its suffix.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("images: got no path; give image files or folders")
    found: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
            if not inside:
                raise FileNotFoundError(f"images: the folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            found += [(file.relative_to(path).as_posix(), file) for file in inside]
        elif not path.is_file():
            raise FileNotFoundError(f"images: there is no file or folder {path}")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"images: {path} is no image by its suffix; it takes {', '.join(IMAGE_SUFFIXES)}")
        else:
            found.append((path.name, path))
    uses = Counter(name for name, _ in found)
    return {file.as_posix() if uses[name] > 1 else name: file for name, file in found}


def read_image(path: str | Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """A Pillow image, RGB or RGBA, turned upright as its EXIF tag says. FileNotFoundError, or data.images.ImageError (a ValueError)
    whose `reason` says what is wrong with it."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(decode_image(Path(path).read_bytes(), max_image_pixels))


def square(image: Image.Image, size: int, interpolation: str = "bicubic") -> Tensor:
    """float32 [3, size, size] in [-1, 1]: on white, the shorter side resized to `size` (antialiased), the centre cropped."""
    cropped = crop_resize(premultiplied(image), center_boxes([image.size])[0], size, interpolation)
    return to_tensor(np.array(cropped)[None])[0]


def cropped(image: Image.Image, multiple: int) -> Tensor:
    """float32 [3, H, W] in [-1, 1]: on white, not resized; the centre with the largest sides that are multiples of `multiple`."""
    width, height = (side // multiple * multiple for side in image.size)
    if not width or not height:
        raise ValueError(
            f"image: its sides must be at least {multiple} pixels to be kept, got {image.width} x {image.height}; give a size"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    region = premultiplied(image).crop((left, top, left + width, top + height))
    return to_tensor(np.array(region)[None])[0]
