"""Square crops of a store's images, as a batch holds them. A crop is a function of (seed, sample, variant)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ov3fast.data import hash_rng, transforms
from ov3fast.data.store import SampleStore
from ov3fast.data.threads import Threads


class Crops:
    """crops(index, variant, images) -> float32 [M, 3, S, S] in [-1, 1]. train=False: centre crops on white."""

    def __init__(self, store: SampleStore, size: int, train: bool, threads: Threads) -> None:
        self.store, self.config, self.size, self.train, self.threads = store, store.config, size, train, threads

    def __call__(self, index: np.ndarray, variant: np.ndarray, images: Mapping[int, Any]) -> Tensor:
        """index, variant: global sample numbers and their variants, int64 [M]. images: those already decoded, by global number."""
        config, size = self.config, self.size

        def picture(item: tuple[int, int]) -> Any:
            i, v = item
            found = images.get(i)
            # The same sample may be in a batch twice, in two crops.
            fits = found is not None and getattr(found, "variant", v) == v
            return found if fits else self.store.image(i, self.shrink(i, v))

        pictures = self.threads.map(picture, list(zip(index.tolist(), variant.tolist(), strict=True)))
        sizes = np.array([getattr(found, "full_size", found.size) for found in pictures], np.float64).reshape(-1, 2)
        background = None
        boxes = self._boxes(index, variant, sizes)
        if self.train and config.background != "white":
            channel = np.arange(3)
            background = 255 * hash_rng.uniform(config.seed, hash_rng.BACKGROUND, index[:, None], variant[:, None], channel)
            if config.background == "mixed":
                background[variant % 4 != 3] = 255
        gap = 1.5 if self.train else None
        out = np.full((len(index), size, size, 4), 255, np.uint8)

        def crop(number: int) -> None:
            resized = transforms.crop_resize(pictures[number], boxes[number].tolist(), size, config.interpolation, gap)
            out[number, ..., : resized.shape[-1]] = resized

        self.threads.map(crop, range(len(index)))
        if self.train and config.flip:
            mirrored = hash_rng.uniform(config.seed, hash_rng.FLIP, index, variant) < 0.5
            out[mirrored] = out[mirrored, :, ::-1]
        return transforms.to_tensor(out, background)

    def shrink(self, index: int, variant: int) -> Callable[[int, int], int] | None:
        """(width, height) of a sample's image -> the factor by which it may be decoded smaller for this variant's crop; None: always decode
        in full."""
        if self.config.decode == "full":
            return None
        which = variant if self.config.variants is None else variant % self.config.variants

        def shrink(width: int, height: int) -> int:
            [box] = self._boxes(np.array([index]), np.array([which]), np.array([[width, height]], np.float64))
            return transforms.reduction(box.tolist(), self.size)

        return shrink

    def _boxes(self, index: np.ndarray, variant: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """float64 [M, 4]: each image's crop, from its (width, height)."""
        if not self.train or self.config.crop != "inception":
            return transforms.center_boxes(sizes)
        draws = np.arange(transforms.CROP_ATTEMPTS * 4).reshape(1, -1, 4)
        uniforms = hash_rng.uniform(self.config.seed, hash_rng.CROP, index[:, None, None], variant[:, None, None], draws)
        return transforms.inception_boxes(sizes, uniforms, (self.config.min_area, 1.0))
