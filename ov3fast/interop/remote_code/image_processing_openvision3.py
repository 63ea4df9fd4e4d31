"""Images -> pixel_values in [-1, 1]: upright, on white, the shorter side resized (bicubic, antialias), the centre cropped."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import PILImageResampling


class OpenVision3ImageProcessor(BaseImageProcessor):
    """Takes Pillow images, paths, uint8 arrays or tensors ([H, W, 3], [3, H, W]), and lists of them.

    size: {"height": n, "width": n} or {"shortest_edge": n}, the square that comes out; the crop and the resizing are one step.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | int | None = None,
        resample: int = PILImageResampling.BICUBIC,
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        do_resize: bool = True,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        side = _side(256 if size is None else size)
        self.size = {"height": side, "width": side}
        self.crop_size = dict(self.size)
        self.resample = int(resample)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.do_resize, self.do_center_crop, self.do_rescale, self.do_normalize = do_resize, do_resize, True, do_normalize

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        size: dict[str, int] | int | None = None,
        resample: int | None = None,
        do_resize: bool | None = None,
        do_normalize: bool | None = None,
        image_mean: Any = None,
        image_std: Any = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """pixel_values: float32 [3, H, W] each, one batch where return_tensors is given."""
        side = _side(self.size if size is None else size)
        resample = self.resample if resample is None else resample
        mean = np.array(self.image_mean if image_mean is None else image_mean, np.float32)
        std = np.array(self.image_std if image_std is None else image_std, np.float32)
        pixels = []
        for image in _flat(images):
            values = _pixels(image, side if (self.do_resize if do_resize is None else do_resize) else None, resample)
            if self.do_normalize if do_normalize is None else do_normalize:
                values = (values / 255 - mean) / std if (mean != 0.5).any() or (std != 0.5).any() else values * (2 / 255) - 1
            else:
                values = values / 255
            pixels.append(np.ascontiguousarray(values.transpose(2, 0, 1), np.float32))
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What is written: without what follows from `size`."""
        return {key: value for key, value in super().to_dict().items() if key not in ("do_center_crop", "do_rescale")}


def _side(size: Any) -> int:
    if isinstance(size, int):
        return size
    size = dict(size)
    sides = {int(size[key]) for key in ("height", "width", "shortest_edge") if size.get(key) is not None}
    if len(sides) != 1:
        raise ValueError(f"OpenVision3ImageProcessor: size must be one side, height = width or shortest_edge; got {size}")
    return sides.pop()


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [one for image in images for one in _flat(image)]
    if not isinstance(images, Image.Image) and getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _pixels(image: Any, side: int | None, resample: int) -> np.ndarray:
    """float32 [H, W, 3] in 0..255."""
    if isinstance(image, str | os.PathLike):
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        values = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
        if values.dtype != np.uint8:
            raise TypeError(f"OpenVision3ImageProcessor: arrays must be uint8, got {values.dtype}")
        if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (3, 4):
            values = values.transpose(1, 2, 0)
        image = Image.fromarray(np.ascontiguousarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values))
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    see_through = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    # Premultiplied, so that colours under full transparency don't bleed into the edges.
    image = image.convert("RGBA").convert("RGBa") if see_through else image.convert("RGB")
    if side is not None:
        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        image = image.resize((side, side), resample, (left, top, left + short, top + short))
    values = np.asarray(image, np.float32)
    if values.shape[2] == 4:
        values = values[..., :3] + 255 * ((255 - values[..., 3:]) / np.float32(255))
    return values.clip(0, 255)


__all__ = ["OpenVision3ImageProcessor"]
