"""Cosine similarity of images and texts, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ov3fast.inference.batches import batch_invariant
from ov3fast.inference.encode import encode
from ov3fast.inference.load import VisionTower
from ov3fast.models.openvision3 import OpenVision3

if TYPE_CHECKING:
    from ov3fast.data.preprocess import ImageLike


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """images [N, E], texts [T, E] -> float32 [N, T] in [-1, 1]; a pair's value has the same bits for any N and T."""
    a, b = (F / F.norm(dim=-1, keepdim=True).clamp_min(1e-12) for F in (images.double().cpu(), texts.double().cpu()))
    cosine: Tensor = (a[:, None] * b[None]).sum(-1)
    return cosine.float()


@torch.inference_mode()
def encode_texts(model: OpenVision3, texts: Sequence[str]) -> Tensor:
    """[T, E], not normalised. ValueError for a released vision tower, which has no text encoder."""
    if isinstance(model, VisionTower):
        raise ValueError("texts: a released vision tower has no text encoder; it takes an OpenVision3")
    with batch_invariant(model):
        return model.encode_text(list(texts)).float().cpu()


def similarity(model: OpenVision3, images: ImageLike | Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
    """float32 [N, T]: cosine similarity of each image and each text. images as for `encode`; ValueError for no texts or a released tower."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"similarity: texts must be a list of at least one string, got {texts!r}")
    features = encode_texts(model, texts)
    return cosines(encode(model, images, tokens=False).pooled, features)
