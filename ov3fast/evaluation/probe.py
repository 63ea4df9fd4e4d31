"""Linear probe: multinomial logistic regression on frozen features.

    min_W  mean_n CE(W x_n + b, y_n) + l2 / 2 |W|^2      x standardised with the training set's mean and deviation

Full-batch L-BFGS in float64 from zero, so the same features give the same accuracy. The strength l2 is chosen on a stratified fifth of the
training set (if several are given), and the fit repeated on all of it; the test set is used only once.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

L2_STRENGTHS = (1e-1, 1e-2, 1e-3)
"""Strongest first: each fit starts from the previous solution, which makes the weaker ones fast."""
FASHION_MNIST_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}


class Labelled(NamedTuple):
    """Pictures uint8 [N, H, W] (grey) with labels int64 [N]."""

    images: Tensor
    labels: Tensor


def read_idx(path: str | Path) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped or not (the format of MNIST): 0, 0, type 8, ndim, then big-endian uint32 sizes."""
    path = Path(path).expanduser()
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        data = file.read()
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"read_idx: {path} is not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if values.size != int(np.prod(shape)):
        raise ValueError(f"read_idx: {path} holds {values.size} values, but its header says {' x '.join(map(str, shape))}")
    return values.reshape(shape)


def fashion_mnist(folder: str | Path, train: int = 3000, test: int = 1000) -> tuple[Labelled, Labelled]:
    """The first `train` and `test` pictures, stratified by class, of the four idx files in `folder`."""
    folder = check_folder(folder)
    parts = {name: torch.from_numpy(read_idx(folder / file).copy()) for name, file in FASHION_MNIST_FILES.items()}
    sets = []
    for part, count in (("train", train), ("test", test)):
        images, labels = parts[f"{part}_images"], parts[f"{part}_labels"].long()
        index = stratified(labels, count)
        sets.append(Labelled(images[index], labels[index]))
    return sets[0], sets[1]


def check_folder(folder: str | Path) -> Path:
    """The folder, if all four files of Fashion-MNIST are there; FileNotFoundError names a missing one."""
    folder = Path(folder).expanduser()
    for file in FASHION_MNIST_FILES.values():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"fashion_mnist: {folder} has no {file}; `ov3fast data demo` fetches the set")
    return folder


def stratified(labels: Tensor, count: int) -> Tensor:
    """Sorted indices of `count` rows, spread over the classes as evenly as possible, the first of each class. ValueError if there are too few rows."""
    classes = labels.unique().tolist()
    shares = [count // len(classes) + (i < count % len(classes)) for i in range(len(classes))]
    chosen = [(labels == value).nonzero()[:share, 0] for value, share in zip(classes, shares, strict=True)]
    index = torch.cat(chosen).sort().values
    if len(index) != count:
        raise ValueError(f"stratified: count {count} over {len(classes)} classes needs more rows of a class than there are")
    return index


def grey_to_rgb(images: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W] -> float32 [N, 3, size, size] in [-1, 1], bicubic with antialias."""
    planes = images[:, None].float() / 127.5 - 1
    planes = F.interpolate(planes, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return planes.clamp(-1, 1).expand(-1, 3, -1, -1)


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    strengths: Sequence[float] = L2_STRENGTHS,
) -> dict[str, Any]:
    """Test accuracy of a linear classifier on features [N, E]; labels int64 [N], every class present in the training set."""
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or labels.shape != (len(features),):
            raise ValueError(
                f"linear_probe: {name} takes features [N, E] and labels [N], got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"linear_probe: {name} holds non-finite features")
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    best = strengths[0]
    if len(strengths) > 1:
        held = torch.zeros(len(train_labels), dtype=torch.bool)
        held[stratified(train_labels, len(train_labels) // 5)] = True
        validation: dict[float, float] = {}
        model = None
        for l2 in strengths:
            model = _fit(train[~held], train_labels[~held], classes, l2, model)
            validation[l2] = _accuracy(model, train[held], train_labels[held])
        # max() keeps the first of equal values, so the strongest wins ties.
        best = max(validation, key=validation.__getitem__)
    model = _fit(train, train_labels, classes, best)
    return {
        "accuracy": _accuracy(model, test, test_labels),
        "train_accuracy": _accuracy(model, train, train_labels),
        "l2": best,
        "chance": 1 / classes,
        "train": len(train),
        "test": len(test),
        "features": train.shape[1],
    }


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return ((features.double() - self.mean) / self.deviation) @ self.weight.T + self.bias


def _fit(features: Tensor, labels: Tensor, classes: int, l2: float, start: _Linear | None = None) -> _Linear:
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, unbiased=False)
    # A constant feature carries no information: leave it at zero instead of dividing by its rounding error.
    deviation = torch.where(deviation > 1e-6 * deviation.max().clamp(min=1e-12), deviation, torch.inf)
    x = (features - mean) / deviation
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone()
        weight = torch.zeros(classes, x.shape[1], dtype=x.dtype) if start is None else start.weight.clone()
        bias = torch.zeros(classes, dtype=x.dtype) if start is None else start.bias.clone()
        weight.requires_grad_(), bias.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=200, history_size=10, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), labels.clone()) + 0.5 * l2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return _Linear(weight.detach(), bias.detach(), mean, deviation)


def _accuracy(model: _Linear, features: Tensor, labels: Tensor) -> float:
    return float((model(features).argmax(1) == labels).double().mean())
