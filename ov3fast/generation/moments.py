"""Mergeable means, variances and covariances, in float64 (Chan, Golub and LeVeque 1983).

    n = a + b;  d = mean_b - mean_a;  mean = mean_a + d b / n;  S = S_a + S_b + d d^T a b / n

Batch size, order and number of ranks affect the result only by rounding (relative error about 1e-15), so metrics computed from
moments don't depend on how the images were split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class _Moments:
    """count, mean [...] and the subclass's centred sum, both float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros((), dtype=torch.float64)

    @staticmethod
    def _product(centred: Tensor) -> Tensor:
        """[N, ...] -> the subclass's statistic, summed over N."""
        raise NotImplementedError

    @classmethod
    def of(cls, batch: Tensor) -> Self:
        """Moments of a batch [N, ...] of any float dtype. ValueError if it has non-finite values."""
        moments = cls()
        if len(batch):
            values = batch.detach().double().cpu()
            if not values.isfinite().all():
                raise ValueError(f"{cls.__name__}: the batch holds values that are not finite")
            moments.count, moments.mean = len(values), values.mean(0)
            moments.sum = cls._product(values - moments.mean)
        return moments

    def add(self, batch: Tensor) -> Self:
        """Add a batch [N, ...]. ValueError if its sample shape differs from earlier ones, or for non-finite values."""
        return self.merge(self.of(batch))

    def merge(self, other: Self) -> Self:
        """Add the samples of another. ValueError if the sample shapes differ."""
        if not other.count:
            return self
        if not self.count:
            self.count, self.mean, self.sum = other.count, other.mean, other.sum
            return self
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"{type(self).__name__}: samples must have one shape; got {tuple(other.mean.shape)} after {tuple(self.mean.shape)}"
            )
        total, difference = self.count + other.count, other.mean - self.mean
        between = self._product(difference[None]) * (self.count * other.count / total)
        self.mean, self.sum = self.mean + difference * (other.count / total), self.sum + other.sum + between
        self.count = total
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """Merge the samples of all ranks; bit-identical on every rank, as each merges in rank order."""
        if not dist.is_initialized():
            return self
        parts: list[tuple[int, Tensor, Tensor] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, (self.count, self.mean, self.sum), group)
        merged = type(self)()
        for part in parts:
            other = type(self)()
            other.count, other.mean, other.sum = part  # type: ignore[misc]
            merged.merge(other)
        self.count, self.mean, self.sum = merged.count, merged.mean, merged.sum
        return self


class ElementMoments(_Moments):
    """Mean and population variance of each element, for the latent statistics."""

    @staticmethod
    def _product(centred: Tensor) -> Tensor:
        return centred.square().sum(0)

    @property
    def var(self) -> Tensor:
        """Population variance (divided by N), in the samples' shape. ValueError if there are no samples."""
        if not self.count:
            raise ValueError("ElementMoments: no sample yet")
        return self.sum / self.count


class FeatureMoments(_Moments):
    """Mean [D] and sample covariance [D, D] of feature vectors, for the Fréchet distance."""

    @staticmethod
    def _product(centred: Tensor) -> Tensor:
        if centred.ndim != 2:
            raise ValueError(f"FeatureMoments: features must have shape [N, D]; got {tuple(centred.shape)}")
        return centred.T @ centred

    @property
    def covariance(self) -> Tensor:
        """Sample covariance (divided by N - 1), as in every FID. ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"FeatureMoments: a covariance needs at least 2 samples, got {self.count}")
        return self.sum / (self.count - 1)
