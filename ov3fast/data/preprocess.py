"""Images in any form -> the tensor that the model takes.

    preprocess("photo.jpg")                                # [1, 3, 256, 256] in [-1, 1]
    preprocess([pillow_image, "photo.jpg", array_HWC], 224)   # [3, 3, 224, 224]

Turned upright, placed on white, the shorter side resized (bicubic, antialiased), centre-cropped: as `ov3fast encode` and evaluation do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ov3fast.data.images import decode_image, upright_rgb
from ov3fast.data.limits import MAX_IMAGE_PIXELS
from ov3fast.data.transforms import crop_resize, premultiplied, to_tensor

if TYPE_CHECKING:
    from PIL import Image

    ImageLike: TypeAlias = Image.Image | str | Path | np.ndarray | Tensor

TAKES = (
    "a Pillow image, a path, a uint8 array [H, W, 3], a uint8 tensor [3, H, W], a float tensor in [-1, 1], or a list of these"
)
ROUNDING = 1e-3
"""How far outside [-1, 1] a float image may be, for example after bicubic resizing in bfloat16."""
OVERSHOOT = 16.0
"""Values above this mean 0..255 to `as_images`."""


def preprocess(
    images: ImageLike | Sequence[ImageLike],
    image_size: int = 256,
    *,
    interpolation: str = "bicubic",
    device: torch.device | str | None = None,
) -> Tensor:
    """Images -> float32 [B, 3, image_size, image_size] in [-1, 1].

    images: one of, or a list of: a Pillow image; a path; a numpy array uint8 [H, W], [H, W, 1, 3 or 4] or a batch [B, H, W, C]; a
    torch tensor uint8 [1, 3 or 4, H, W] or a batch of such. A float tensor [3, H, W] or [B, 3, H, W] counts as prepared: it must be in
    [-1, 1] and is not resized, so on its own it may have any size. FileNotFoundError, TypeError for other types, ValueError
    for a wrong shape or range, data.images.ImageError (a ValueError) for a file that can't be decoded.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"preprocess: image_size must be at least 1 pixel, got {image_size!r}")
    parts = [_batch(image, image_size, interpolation) for image in (images if isinstance(images, list | tuple) else [images])]
    if not parts:
        raise ValueError(f"preprocess: got an empty list; it takes {TAKES}")
    sizes = {tuple(part.shape[2:]) for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"preprocess: float tensors are not resized; got sizes {sorted(sizes)} in one batch")
    return torch.cat(parts).to(device)


def as_images(images: ImageLike | Sequence[ImageLike], image_size: int) -> Tensor:
    """The argument of a model's `encode` -> float images [B, 3, H, W]: a float tensor unchanged, anything else through `preprocess`.

    ValueError for floats in 0..255. Only tensors on the CPU are checked (a GPU tensor would force a synchronization), with tolerance:
    noise and resampling slightly exceed [-1, 1], an 8-bit image far exceeds it.
    """
    if not isinstance(images, Tensor) or images.dtype == torch.uint8:
        return preprocess(images, image_size)
    if images.is_floating_point() and images.numel() and images.device.type == "cpu" and not torch.compiler.is_compiling():
        high = images.detach().max().item()
        if high > OVERSHOOT:
            raise ValueError(
                f"images: floats must lie in [-1, 1], got up to {high:g}; give uint8, or images / 127.5 - 1 for 0..255"
            )
    return images


def square(image: Image.Image, size: int, interpolation: str = "bicubic") -> Tensor:
    """A Pillow image, RGB or RGBA -> float32 [3, size, size] in [-1, 1]: on white, the shorter side resized to `size`
    (antialiased), the centre cropped."""
    return to_tensor(square_pixels(image, size, interpolation)[None])[0]


def square_pixels(image: Image.Image, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """The pixels from which `square` makes a tensor: uint8 [size, size, 3], or 4 for an image with alpha, whose colours are premultiplied."""
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)  # transforms.center_boxes for one image, in a tenth of its time
    return crop_resize(premultiplied(image), (left, top, left + side, top + side), size, interpolation)


def read_image(path: str | Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """An upright Pillow image, RGB or RGBA. FileNotFoundError, or data.images.ImageError (a ValueError) with a `reason`."""
    return decode_image(Path(path).expanduser().read_bytes(), max_image_pixels)


def to_pillow(image: ImageLike) -> Image.Image:
    """One image that is not yet prepared -> a Pillow image, RGB or RGBA. Errors as in `preprocess`."""
    from PIL import Image

    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return upright_rgb(image.copy())
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"preprocess: an integer tensor must be uint8, got {image.dtype}")
        if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
            raise ValueError(
                f"preprocess: a uint8 tensor must be [3, H, W], got {tuple(image.shape)}; .permute(2, 0, 1) of [H, W, 3]"
            )
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"preprocess: takes {TAKES}; got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(
            f"preprocess: a numpy image must be uint8, 0..255, got {image.dtype}; scale it and use .astype(numpy.uint8)"
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] not in (3, 4)) or 0 in image.shape:
        raise ValueError(f"preprocess: a numpy image must be [H, W], [H, W, 3] or [H, W, 4], got {image.shape}")
    return upright_rgb(Image.fromarray(np.ascontiguousarray(image)))


def _batch(image: Any, size: int, interpolation: str) -> Tensor:
    if isinstance(image, Tensor) and image.is_floating_point():
        return _prepared(image)
    if isinstance(image, Tensor | np.ndarray) and image.ndim == 4:
        if not len(image):
            raise ValueError(f"preprocess: got an empty batch, {tuple(image.shape)}")
        return torch.cat([_batch(one, size, interpolation) for one in image])
    return square(to_pillow(image), size, interpolation)[None]


def _prepared(images: Tensor) -> Tensor:
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"preprocess: float images must be [3, H, W] or [B, 3, H, W], got {tuple(images.shape)}")
    images = images.float()
    low, high = (images.min().item(), images.max().item()) if images.numel() else (0.0, 0.0)
    if not -1 - ROUNDING <= low <= high <= 1 + ROUNDING:
        raise ValueError(
            f"preprocess: float images must lie in [-1, 1], got {low:g} to {high:g}; give uint8, or images / 127.5 - 1 for 0..255"
        )
    return images
