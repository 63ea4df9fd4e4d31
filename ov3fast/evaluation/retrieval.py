"""Image-text retrieval and zero-shot classification from embeddings.

R@k = fraction of the queries with a correct answer (an item of the query's concept) among the k best by cosine similarity. Ties are broken
pessimistically: a wrong item that scores as high as the best correct one ranks before it, so a collapsed model, which
gives everything the same score, gets 0 and not 100 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RECALLS = (1, 5, 10)
PROTOCOL = "cosine/pessimistic-ties/any-item-of-the-concept"


def similarity(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosine similarities [Q, G] float64 of embeddings [Q, E] and [G, E]. ValueError for different widths or non-finite values."""
    for name, value in (("queries", queries), ("gallery", gallery)):
        if value.ndim != 2 or not len(value):
            raise ValueError(f"similarity: {name} must be [N, E] with N of at least 1, got {tuple(value.shape)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"similarity: {name} holds non-finite embeddings")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"similarity: queries and gallery must have the same width, got {queries.shape[1]} and {gallery.shape[1]}"
        )
    return F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T


def ranks(scores: Tensor, query_concepts: Tensor, gallery_concepts: Tensor) -> Tensor:
    """0-based rank of each query's best correct answer, [Q] int64; ties count against it.

    scores [Q, G]; concepts are int64 ids [Q] and [G]. ValueError if a query has no correct answer in the gallery.
    """
    right = query_concepts[:, None] == gallery_concepts[None, :]
    if not bool(right.any(dim=1).all()):
        missing = int((~right.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"ranks: query {missing} (concept {int(query_concepts[missing])}) has no correct answer in the gallery"
        )
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


def recalls(places: Tensor, ks: Sequence[int] = RECALLS) -> dict[str, float]:
    """{"R@1": ..., ...} as fractions in [0, 1], and the 1-based median rank."""
    values = {f"R@{k}": float((places < k).double().mean()) for k in ks}
    return {**values, "median_rank": float(places.double().median()) + 1}


def chance(query_concepts: Tensor, gallery_concepts: Tensor, ks: Sequence[int] = RECALLS) -> dict[str, float]:
    """The R@k of a random order: mean over queries of 1 - C(G - m, k) / C(G, k), m the number of correct answers."""
    size = len(gallery_concepts)
    counts = (query_concepts[:, None] == gallery_concepts[None, :]).sum(dim=1).tolist()
    total = {k: 0.0 for k in ks}
    for right in counts:
        for k in ks:
            total[k] += 1 - math.comb(size - right, min(k, size)) / math.comb(size, min(k, size))
    return {f"R@{k}": total[k] / len(counts) for k in ks}


def retrieval(
    images: Tensor,
    texts: Tensor,
    image_concepts: Tensor,
    text_concepts: Tensor,
    ks: Sequence[int] = RECALLS,
) -> dict[str, Any]:
    """R@k in both directions: images [N, E] with concepts [N] int64, texts [M, E] with concepts [M] int64.

    A text whose concept has no image is still a distractor for the images, but not a query.
    """
    scores = similarity(images, texts)
    asked = torch.isin(text_concepts, image_concepts)
    return {
        "image_to_text": recalls(ranks(scores, image_concepts, text_concepts), ks),
        "text_to_image": recalls(ranks(scores.T[asked], text_concepts[asked], image_concepts), ks),
        "chance": {
            "image_to_text": chance(image_concepts, text_concepts, ks),
            "text_to_image": chance(text_concepts[asked], image_concepts, ks),
        },
        "images": len(images),
        "texts": len(texts),
        "protocol": PROTOCOL,
    }


def zero_shot(images: Tensor, classes: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, Any]:
    """Top-k accuracy of images [N, E] among class embeddings [K, E] (of the names), labels [N] int64 in 0..K-1."""
    if labels.shape != (len(images),) or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise ValueError(f"zero_shot: labels must be [{len(images)}] in 0..{len(classes) - 1}, got {tuple(labels.shape)}")
    places = ranks(similarity(images, classes), labels, torch.arange(len(classes)))
    return {
        **{f"top{k}": float((places < k).double().mean()) for k in ks},
        "chance": {f"top{k}": min(k, len(classes)) / len(classes) for k in ks},
        "classes": len(classes),
        "images": len(images),
        "protocol": "cosine/pessimistic-ties/name-as-prompt",
    }


def concept_ids(*columns: Sequence[str]) -> tuple[Tensor, ...]:
    """Concept names -> int64 ids, shared by all columns and numbered by first appearance."""
    known: dict[str, int] = {}
    return tuple(torch.tensor([known.setdefault(name, len(known)) for name in column], dtype=torch.int64) for column in columns)


def nearest(scores: Tensor, k: int) -> Tensor:
    """Indices [Q, min(k, G)] of the best items; among equals the earlier one comes first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]
