"""Distances between sets of images in the features of a frozen network.

Frechet distance (Heusel et al. 2017):      |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
Inception score (Salimans et al. 2016):     exp(mean over images of KL(p(y | x) || p(y))), over splits in order
precision, recall (Kynkaanniemi et al. 2019): the share of one set that lies within the other's k-th neighbours' distances
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ov3fast.generation.moments import FeatureMoments

NEIGHBOURS = 3
CHUNK = 2048


class PrecisionRecall(NamedTuple):
    """precision: generated images inside the reference's manifold; recall: reference images inside the generated one's."""

    precision: float
    recall: float


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Between two Gaussians, in float64. mean [D], covariance [D, D], symmetric and positive semi-definite.

    tr (C1 C2)^(1/2) = tr (R C2 R)^(1/2) with R = C1^(1/2): a symmetric matrix, so that no imaginary part arises and fewer samples than
    dimensions do no harm. ValueError for shapes that don't fit.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    if not mean1.shape == mean2.shape == covariance1.shape[:1] == covariance2.shape[:1]:
        raise ValueError(
            "frechet_distance: both sets need features of one width; got "
            f"{tuple(mean1.shape)} with {tuple(covariance1.shape)}, and {tuple(mean2.shape)} with {tuple(covariance2.shape)}"
        )
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ covariance2 @ root
    trace = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    squares = (mean1 - mean2).square().sum()
    return float(squares + covariance1.trace() + covariance2.trace() - 2 * trace)


def frechet_of(first: FeatureMoments, second: FeatureMoments) -> float:
    """frechet_distance of two sets' moments."""
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation (population) over splits, in order, of class logits [N, K]; float64. ValueError for N < splits."""
    if len(logits) < splits:
        raise ValueError(f"inception_score: {splits} splits need as many images, got {len(logits)}")
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(unbiased=False))


def precision_recall(generated: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Of features [N, D] and [M, D], in float32 distances, in memory of CHUNK rows. ValueError for k or fewer images in a set."""
    for name, features in (("generated", generated), ("reference", reference)):
        if len(features) <= k:
            raise ValueError(f"precision_recall: {name} needs more than k={k} images, got {len(features)}")
    radii = [_radii(features, k) for features in (generated, reference)]
    return PrecisionRecall(_inside(generated, reference, radii[1]), _inside(reference, generated, radii[0]))


def _radii(features: Tensor, k: int) -> Tensor:
    """The distance of each row to its k-th neighbour: the (k + 1)-th smallest, itself counted."""
    return torch.cat([torch.cdist(rows, features).kthvalue(k + 1, 1).values for rows in features.split(CHUNK)])


def _inside(features: Tensor, manifold: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(rows, manifold) <= radii).any(1) for rows in features.split(CHUNK)]
    return float(torch.cat(inside).double().mean())
