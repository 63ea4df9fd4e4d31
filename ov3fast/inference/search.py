"""Exact nearest images in an embeddings file, by text or by image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ov3fast.inference.batches import batch_invariant
from ov3fast.inference.embeddings import Embeddings, read_embeddings
from ov3fast.inference.load import VisionTower
from ov3fast.models.openvision3 import OpenVision3

if TYPE_CHECKING:
    from ov3fast.data.preprocess import ImageLike


class Hit(NamedTuple):
    """An image of the index and its cosine similarity to the query."""

    name: str
    score: float


@torch.inference_mode()
def search(
    model: OpenVision3 | VisionTower,
    index: Embeddings | str | Path,
    *,
    text: str | None = None,
    image: ImageLike | None = None,
    top: int = 10,
) -> list[Hit]:
    """The `top` images of the index that are nearest to a text or an image, nearest first; ties in the index's order.

    index: the result of `encode` or `read_embeddings` (a file, or a folder of parts), made by the same model. ValueError unless exactly one of text and image is given,
    for a text with a released tower, which has no text encoder, or if the index's vectors have another width or latent convention.
    """
    if (text is None) == (image is None):
        raise ValueError("search: set either text or image")
    if top < 1:
        raise ValueError(f"search: top must be at least 1, got {top}")
    if not isinstance(index, Embeddings):
        index = read_embeddings(index)
    convention = index.about.get("latents", model.encoder.latent_convention)
    if convention != model.encoder.latent_convention:
        raise ValueError(
            f"search: the index was made with latents {convention!r}, but the model takes {model.encoder.latent_convention!r}"
        )
    if text is not None and not isinstance(model, OpenVision3):
        raise ValueError("search: a released vision tower has no text encoder; use an image, or an OpenVision3")
    with batch_invariant(model):  # as the index was made
        if text is not None:
            assert isinstance(model, OpenVision3)
            query = model.encode_text([text])
        else:
            assert image is not None
            query = model.encode(image)[0]  # type: ignore[arg-type]
    if query.shape[1] != index.pooled.shape[1]:
        raise ValueError(
            f"search: the index has vectors of width {index.pooled.shape[1]}, but the model's have {query.shape[1]}"
        )
    scores = F.normalize(index.pooled.float(), dim=-1) @ F.normalize(query.float().cpu(), dim=-1)[0]
    order = torch.sort(scores, descending=True, stable=True)
    return [Hit(index.names[int(i)], float(s)) for s, i in zip(order.values[:top], order.indices[:top], strict=True)]
