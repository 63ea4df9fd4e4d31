"""Distances between sets of images in the feature space of a frozen network.

Frechet distance (Heusel et al. 2017):      |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
Inception score (Salimans et al. 2016):     exp(mean over images of KL(p(y | x) || p(y))), averaged over consecutive splits
precision, recall (Kynkaanniemi et al. 2019): fraction of one set within the k-th-nearest-neighbour balls of the other
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ov3fast.generation.moments import FeatureMoments

NEIGHBOURS = 3
CHUNK = 2048


class PrecisionRecall(NamedTuple):
    """precision: share of generated images on the reference manifold; recall: share of reference images on the generated."""

    precision: float
    recall: float


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Frechet distance of two Gaussians, in float64. mean [D]; covariance [D, D], symmetric positive semi-definite.

    tr (C1 C2)^(1/2) = tr (R C2 R)^(1/2) with R = C1^(1/2). R C2 R is symmetric, so no imaginary parts arise, and
    singular covariances (fewer samples than dimensions) are fine. ValueError for mismatched shapes.
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
    """frechet_distance between two sets, from their moments."""
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and population standard deviation over consecutive splits of logits [N, K], in float64. ValueError if N < splits."""
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
    """Of features [N, D] and [M, D]; float32 distances, CHUNK rows at a time. ValueError if a set has k or fewer images."""
    for name, features in (("generated", generated), ("reference", reference)):
        if len(features) <= k:
            raise ValueError(f"precision_recall: {name} needs more than k={k} images, got {len(features)}")
    radii = [_radii(features, k) for features in (generated, reference)]
    return PrecisionRecall(_inside(generated, reference, radii[1]), _inside(reference, generated, radii[0]))


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th neighbour: the (k + 1)-th smallest, counting itself."""
    return torch.cat([torch.cdist(rows, features).kthvalue(k + 1, 1).values for rows in features.split(CHUNK)])


def _inside(features: Tensor, manifold: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(rows, manifold) <= radii).any(1) for rows in features.split(CHUNK)]
    return float(torch.cat(inside).double().mean())
