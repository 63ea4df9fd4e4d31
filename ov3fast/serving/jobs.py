"""The jobs of the model's thread: encode, reconstruct, caption and texts, with the same bits in any batch."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ov3fast.data.images import decode_image
from ov3fast.data.preprocess import square
from ov3fast.inference.batches import InProvenBatches, batch_invariant
from ov3fast.inference.load import VisionTower
from ov3fast.inference.reconstruct import Reconstructed, reconstruct_batch
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.serving.batching import Run
from ov3fast.serving.options import Limits


class Encoded(NamedTuple):
    """pooled float32 [E], tokens float32 [N, D]."""

    pooled: Tensor
    tokens: Tensor


class Jobs:
    """The model's calls by name; each takes (bucket, items) and returns one result per item, with the bits that the item has alone.

    encode: (size, pictures) -> Encoded. reconstruct: (size, pictures) -> Reconstructed. caption: ((size, beams), pictures) -> str.
    text: (None, texts) -> feature [E]. A picture is a result of `prepare`. A released tower has only encode.
    """

    def __init__(self, model: OpenVision3 | VisionTower, max_batch: int) -> None:
        self.model, self.max_batch = model, max_batch
        self.default_size = model.encoder.config.image_size
        self.stride = VAE_STRIDE * model.encoder.config.patch_size
        self._batches: dict[tuple[str, Hashable], InProvenBatches] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return ("encode",) if isinstance(self.model, VisionTower) else ("encode", "reconstruct", "caption", "text")

    def runs(self) -> dict[str, Run]:
        return {name: partial(self.run, name) for name in self.names}

    def run(self, name: str, bucket: Hashable, items: list[Any]) -> list[Any]:
        key = (name, bucket)
        if key not in self._batches:
            call = getattr(self, f"_{name}")
            self._batches[key] = InProvenBatches(lambda items: call(bucket, items), self.max_batch)
        with self._mode():
            return self._batches[key](items)

    def warm_up(self, seconds: float = 10.0) -> None:
        """Runs each job once at the model's own size, so that everything is loaded before the first request, and verifies batches of 2, 4, 8, ... for
        `seconds`. Larger batches are not used: a model that slow gains nothing from them."""
        size = self.default_size
        noise = torch.Generator().manual_seed(0)
        pictures = list(torch.rand(self.max_batch, 3, size, size, generator=noise) * 2 - 1)
        for name in self.names[1:]:
            bucket: Hashable = {"caption": (size, 1), "text": None}.get(name, size)
            self.run(name, bucket, ["a"] if name == "text" else pictures[:1])
        began, count, proven = time.monotonic(), 1, 1
        while count <= self.max_batch and time.monotonic() - began < seconds:
            self.run("encode", size, pictures[:count])
            count, proven = 2 * count, count
        self.max_batch = proven
        for batches in self._batches.values():
            batches.most = proven

    def proven_sizes(self) -> list[int]:
        """The batch sizes that `encode` may use at the model's own size, among those tried."""
        tried = self._batches.get(("encode", self.default_size))
        return [] if tried is None else sorted(size for size, held in tried.proven.items() if held)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with torch.inference_mode(), batch_invariant(self.model):
            yield

    def _encode(self, size: int, pictures: list[Tensor]) -> list[Encoded]:
        pooled, tokens = self.model.encode(torch.stack(pictures))
        return [Encoded(*row) for row in zip(pooled.float().cpu(), tokens.float().cpu(), strict=True)]

    def _reconstruct(self, size: int, pictures: list[Tensor]) -> list[Reconstructed]:
        assert isinstance(self.model, OpenVision3)
        return reconstruct_batch(self.model, torch.stack(pictures))

    def _caption(self, bucket: tuple[int, int], pictures: list[Tensor]) -> list[str]:
        assert isinstance(self.model, OpenVision3)
        return self.model.caption(torch.stack(pictures), beams=bucket[1])

    def _text(self, bucket: None, texts: list[str]) -> list[Tensor]:
        assert isinstance(self.model, OpenVision3)
        return list(self.model.encode_text(texts).float().cpu())


def prepare(data: bytes, size: int, limits: Limits) -> Tensor:
    """An image file's bytes -> float32 [3, size, size] in [-1, 1], as `ov3fast encode` prepares it. ImageError."""
    return square(decode_image(data, limits.max_pixels, limits.max_frames), size)
