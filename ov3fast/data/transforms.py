"""Images to tensors: crop boxes, antialiased resizing, backgrounds, [-1, 1].

A crop is a box (left, upper, right, lower) in float pixels, resampled in one step by Pillow (whose bicubic and bilinear
filters widen with the scale, so they antialias). Boxes and backgrounds are computed for a whole batch at once, from
uniform numbers that the caller draws from hash_rng.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ov3fast.data.jpeg import Reduced

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = ("bicubic", "bilinear")
CROP_ATTEMPTS = 10


def inception_boxes(
    sizes_B2: np.ndarray, uniforms_BA4: np.ndarray, area: tuple[float, float] = (0.4, 1.0), ratio: float = 4 / 3
) -> np.ndarray:
    """Inception crops: float64 [B, 4] boxes inside images of `sizes_B2` (width, height).

    Each of the A attempts draws an area fraction uniform in `area`, an aspect ratio log-uniform in [1/ratio, ratio] and a
    position; the first that fits is taken, or else the largest centred box within the ratios. Source: Szegedy et al. 2015; the
    attempts and the fallback follow torchvision's RandomResizedCrop. OpenVision takes at least 40 % of the area.
    """
    size_B12 = np.asarray(sizes_B2, np.float64)[:, None, :]
    share, aspect = area[0] + (area[1] - area[0]) * uniforms_BA4[..., 0], np.log(ratio) * (2 * uniforms_BA4[..., 1] - 1)
    pixels = share * size_B12[..., 0] * size_B12[..., 1]
    box_BA2 = np.sqrt(pixels)[..., None] * np.exp(np.stack([aspect, -aspect], -1) / 2)
    fits_BA = (box_BA2 <= size_B12).all(-1)
    first_B = fits_BA.argmax(1)
    rows = np.arange(len(first_B))
    fallback_B2 = np.minimum(size_B12[:, 0], size_B12[:, 0, ::-1] * ratio)
    box_B2 = np.where(fits_BA.any(1)[:, None], box_BA2[rows, first_B], fallback_B2)
    place_B2 = np.where(fits_BA.any(1)[:, None], uniforms_BA4[rows, first_B, 2:], 0.5)
    corner_B2 = place_B2 * (size_B12[:, 0] - box_B2)
    return np.concatenate([corner_B2, corner_B2 + box_B2], 1)


def center_boxes(sizes_B2: np.ndarray) -> np.ndarray:
    """Resize-and-centre-crop as boxes, float64 [B, 4]: the largest centred squares."""
    sizes_B2 = np.asarray(sizes_B2, np.float64)
    side_B1 = sizes_B2.min(1, keepdims=True)
    corner_B2 = (sizes_B2 - side_B1) / 2
    return np.concatenate([corner_B2, corner_B2 + side_B1], 1)


def reduction(box: Sequence[float], size: int) -> int:
    """The largest of 1, 2, 4 and 8 by which an image may be decoded smaller while the box keeps at least `size` pixels a side."""
    side = min(box[2] - box[0], box[3] - box[1])
    return max((r for r in (2, 4, 8) if side >= r * size), default=1)


def crop_resize(
    image: Image.Image | Reduced, box: Sequence[float], size: int, interpolation: str = "bicubic", gap: float | None = None
) -> np.ndarray:
    """The box of the image as uint8 [size, size, C], antialiased. Modes RGB and RGBa (premultiplied, so that colours
    under full transparency don't bleed into the edges). With `gap`, images that shrink by more than twice as much are
    first averaged over whole pixels (Pillow's reducing_gap): much faster, and close to the exact filter.

    An image that was decoded smaller is resized by PyTorch, several times as fast as by Pillow, from a box of whole pixels; `box` is in
    pixels of the full image."""
    from PIL import Image

    if isinstance(image, Reduced):
        return _crop_reduced(image, box, size, interpolation)
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    return np.array(image.resize((size, size), resample, tuple(box), reducing_gap=gap))


def _crop_reduced(picture: Reduced, box: Sequence[float], size: int, interpolation: str) -> np.ndarray:
    # By the reduction, not the sizes: those are rounded up, so the last column or row may extend beyond the image.
    left, upper, right, lower = (round(side / picture.reduction) for side in box)
    pixels_HWC = np.ascontiguousarray(picture.pixels[upper : max(lower, upper + 1), left : max(right, left + 1)])
    x = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    made = torch.nn.functional.interpolate(x, (size, size), mode=interpolation, antialias=True)
    return made[0].permute(1, 2, 0).numpy()


def premultiplied(image: Any) -> Any:
    """RGB unchanged, anything with alpha as RGBa."""
    return image if image.mode == "RGB" else image.convert("RGBA").convert("RGBa")


def to_tensor(pictures_BHWC: np.ndarray, background_B3: np.ndarray | None = None) -> torch.Tensor:
    """uint8 [B, H, W, 3 or 4] (RGB, or RGBa over the background, 0..255, white if None) -> float32 [B, 3, H, W] in [-1, 1]."""
    x = torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).contiguous()
    rgb_B3HW = x[:, :3].float()
    if x.shape[1] == 4:
        under = torch.full((len(x), 3), 255.0) if background_B3 is None else torch.from_numpy(background_B3).float()
        clear_B1HW = (255 - x[:, 3:]).float() / 255
        rgb_B3HW.addcmul_(under[:, :, None, None], clear_B1HW)
    return rgb_B3HW.clamp_(0, 255).mul_(2 / 255).sub_(1)
