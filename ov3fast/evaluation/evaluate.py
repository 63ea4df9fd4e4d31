"""The whole evaluation of a model on held-out data.

    result = evaluate(model, build_demo())                         # the demo's sets
    result = evaluate(model, "shards/", fashion_mnist="fmnist/")   # a folder of webdataset shards
    print_tables(result.tables)
    write_report("report.html", result, run_dir="runs/demo")

Per set of captioned pictures: retrieval both ways, zero-shot over the names, reconstruction, captions. Photos: reconstruction. A
folder of idx files: linear probe. Nothing is random, and no gradient is taken through the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast.data.demo import DemoSet
from ov3fast.evaluation import probe as linear
from ov3fast.evaluation.headline import headline
from ov3fast.evaluation.metrics import standard_metrics
from ov3fast.evaluation.pictures import Pictures, embed_images, embed_texts, read_pictures, spread
from ov3fast.evaluation.reconstruction import Reconstruction, reconstruct, to_model_range
from ov3fast.evaluation.retrieval import retrieval, similarity, zero_shot
from ov3fast.models.config import VAE_STRIDE
from ov3fast.terminal import is_terminal


@dataclass(frozen=True)
class Sources:
    """The evaluation data: sets of captioned pictures by name, photos, and the folder of Fashion-MNIST; any may be missing."""

    name: str
    pairs: dict[str, Path] = field(default_factory=dict)
    photos: Path | None = None
    fashion_mnist: Path | None = None


@dataclass(frozen=True)
class Ranking:
    """Pictures and texts of one retrieval, for the report: scores float64 [N, M], the picture's own text int64 [N]."""

    pictures: Pictures
    texts: list[str]
    scores: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Evaluation:
    """tables: JSON-able metrics. The rest are the pictures behind them, by set, for the report."""

    tables: dict[str, Any]
    reconstructions: dict[str, tuple[Pictures, Reconstruction]] = field(default_factory=dict)
    rankings: dict[str, Ranking] = field(default_factory=dict)
    captioned: Pictures | None = None


def evaluate(
    model: Any,
    data: DemoSet | str | Path | Sequence[str | Path],
    *,
    lpips: nn.Module | None = None,
    image_size: int | None = None,
    batch_size: int = 64,
    pictures: int = 64,
    captions: int = 10,
    beams: int = 1,
    probe_train: int = 3000,
    probe_test: int = 1000,
    fashion_mnist: str | Path | None = None,
    caption_key: str | None = None,
    limit: int | None = 5000,
    skip_budget: float = 0.1,
    progress: bool = True,
) -> Evaluation:
    """Evaluates an OpenVision3 on the demo set's held-out parts, or on shards (a folder, a glob pattern, tar files).

    lpips: an LPIPS module; None leaves that metric out. image_size: pixels, default the model's. pictures: how many captioned pictures
    are reconstructed; captions: how many are captioned, evenly spaced. caption_key: the caption to use as text, default
    name, caption or txt. limit: pictures read per set. skip_budget: the largest fraction that may be unreadable. The probe runs if there is a folder of Fashion-MNIST.
    FileNotFoundError or DataError if there is no data to evaluate on; ValueError for a wrong size.
    """
    progress = progress and is_terminal()
    sources = sources_of(data, fashion_mnist)
    size = model.config.vision.image_size if image_size is None else image_size
    stride = VAE_STRIDE * model.config.vision.patch_size
    if size < stride or size % stride:
        raise ValueError(
            f"evaluate: image_size must be a positive multiple of {stride} pixels, got {size}; the VAE and the patches take multiples of {stride}"
        )
    if sources.fashion_mnist is not None:
        linear.check_folder(sources.fashion_mnist)
    training = model.training
    model.eval()
    run = _Run(model, lpips, size, batch_size, progress, by_style=sources.name == "demo")
    try:
        sets = {name: run.read(path, limit, skip_budget) for name, path in sources.pairs.items()}
        photos = None if sources.photos is None else run.read(sources.photos, limit, skip_budget)
        run.retrieval(sets, caption_key)
        run.reconstruction(sets, photos, pictures)
        run.captions(sets, captions, beams, caption_key)
        if sources.fashion_mnist is not None:
            run.probe(sources.fashion_mnist, probe_train, probe_test)
    finally:
        model.train(training)
    return run.result(sources, sets, photos)


def sources_of(data: DemoSet | str | Path | Sequence[str | Path], fashion_mnist: str | Path | None = None) -> Sources:
    """The demo set's held-out parts, or shards as one set named "data"."""
    if not isinstance(data, DemoSet):
        return Sources("shards", {"data": data}, None, None if fashion_mnist is None else Path(fashion_mnist))
    pairs = {"style": data.pairs_style, "unseen": data.pairs_unseen}
    pairs = {name: path for name, path in pairs.items() if path is not None}
    return Sources("demo", pairs, data.photos_heldout, Path(fashion_mnist) if fashion_mnist else data.fashion_mnist)


class _Run:
    """An evaluation in progress: tables and pictures so far, and the time of each part."""

    def __init__(self, model: Any, lpips: nn.Module | None, size: int, batch_size: int, progress: bool, by_style: bool) -> None:
        self.model, self.size, self.batch_size, self.progress, self.by_style = model, size, batch_size, progress, by_style
        self.metrics = standard_metrics(None if lpips is None else lpips.to(model.device))
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.tables: dict[str, Any] = {"reconstruction": {}, "retrieval": {}, "zero_shot": {}, "captions": [], "probe": None}
        self.protocols: dict[str, str] = {}
        self.reconstructions: dict[str, tuple[Pictures, Reconstruction]] = {}
        self.rankings: dict[str, Ranking] = {}
        self.captioned: Pictures | None = None

    @contextmanager
    def timed(self, part: str, count: int = 0) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
        self.counts[part] = self.counts.get(part, 0) + count

    def read(self, path: Any, limit: int | None, skip_budget: float) -> Pictures:
        with self.timed("read"):
            found = read_pictures(path, self.size, limit=limit, skip_budget=skip_budget, progress=self.progress)
        self.counts["read"] += len(found)
        return found

    def retrieval(self, sets: dict[str, Pictures], caption_key: str | None) -> None:
        texts = {name: pictures.texts(caption_key) for name, pictures in sets.items()}
        # A picture without a text has no correct answer.
        kept = {name: [i for i, text in enumerate(of) if text] for name, of in texts.items()}
        sets = {name: sets[name].rows(rows) for name, rows in kept.items() if rows}
        names = {name: [texts[name][i] for i in kept[name]] for name in sets}
        if not sets:
            return
        classes = list(dict.fromkeys(text for of in names.values() for text in of))
        with self.timed("embed texts", len(classes)):
            class_features = embed_texts(self.model, classes)
        for name, pictures in sets.items():
            with self.timed("embed images", len(pictures)):
                features = embed_images(self.model, pictures.images, self.batch_size, self.progress, f"embed {name}")
            labels = torch.tensor([classes.index(text) for text in names[name]])
            self.tables["zero_shot"][name] = zero_shot(features, class_features, labels)
            self._rank(name, pictures, features, class_features, classes, labels)

    def _rank(
        self, name: str, pictures: Pictures, features: Tensor, class_features: Tensor, classes: list[str], labels: Tensor
    ) -> None:
        """Retrieval against all of the set's texts. The demo's styles, with one picture per concept each, are ranked separately and
        averaged."""
        own = labels.unique()
        texts, text_features = [classes[i] for i in own.tolist()], class_features[own]
        styles = pictures.column("style") if self.by_style else [""] * len(pictures)
        groups = {style: [i for i, s in enumerate(styles) if s == style] for style in sorted(set(styles))}
        by_style = {
            style: retrieval(features[rows], text_features, labels[rows], own)
            for style, rows in ((style, torch.tensor(rows)) for style, rows in groups.items())
        }
        self.tables["retrieval"][name] = {**_mean_of(list(by_style.values())), "styles": by_style}
        first = max(groups, key=lambda style: len(groups[style]))
        rows = torch.tensor(groups[first])
        answer = torch.searchsorted(own, labels[rows])
        self.rankings[name] = Ranking(pictures.rows(rows.tolist()), texts, similarity(features[rows], text_features), answer)

    def reconstruction(self, sets: dict[str, Pictures], photos: Pictures | None, count: int) -> None:
        parts = {}
        if sets and count:
            shares = [count // len(sets) + (i < count % len(sets)) for i in range(len(sets))]
            chosen = [s.rows(spread(len(s), share)) for s, share in zip(sets.values(), shares, strict=True)]
            parts["pictures"] = _join([part for part in chosen if len(part)])
        if photos is not None:
            parts["photos"] = photos
        for name, pictures in parts.items():
            with self.timed("reconstruct", len(pictures)):
                found = reconstruct(self.model, pictures.images, self.metrics, self.batch_size)
            self.reconstructions[name] = (pictures, found)
            self.tables["reconstruction"][name] = found.table(pictures.keys)
            self.protocols |= found.protocols

    def captions(self, sets: dict[str, Pictures], count: int, beams: int, caption_key: str | None) -> None:
        if not sets or not count:
            return
        shares = [count // len(sets) + (i < count % len(sets)) for i in range(len(sets))]
        chosen = [s.rows(spread(len(s), share)) for s, share in zip(sets.values(), shares, strict=True)]
        of_set = [name for name, part in zip(sets, chosen, strict=True) for _ in range(len(part))]
        pictures = _join([part for part in chosen if len(part)])
        with self.timed("caption", len(pictures)), torch.inference_mode():
            texts = self.model.caption(to_model_range(pictures.images), beams=beams)
        self.captioned = pictures
        self.tables["captions"] = [
            {"key": key, "set": name, "caption": text, "reference": reference}
            for key, name, text, reference in zip(pictures.keys, of_set, texts, pictures.own_captions(caption_key), strict=True)
        ]

    def probe(self, folder: Path, train: int, test: int) -> None:
        parts = linear.fashion_mnist(folder, train, test)
        with self.timed("probe", train + test):
            features = [self._grey_features(part.images) for part in parts]
            table = linear.linear_probe(features[0], parts[0].labels, features[1], parts[1].labels)
            pixels = [part.images.flatten(1).float() for part in parts]
            table["pixels"] = linear.linear_probe(pixels[0], parts[0].labels, pixels[1], parts[1].labels, (0.1,))["accuracy"]
        self.tables["probe"] = {**table, "dataset": "Fashion-MNIST", "image_size": self.size}

    def _grey_features(self, images: Tensor) -> Tensor:
        """Pooled features of grey pictures, resized batch by batch."""
        from rich.progress import track

        steps = track(range(0, len(images), self.batch_size), "probe", disable=not self.progress, transient=True)
        parts = []
        with torch.inference_mode():
            for start in steps:
                pictures = linear.grey_to_rgb(images[start : start + self.batch_size], self.size)
                parts.append(self.model.encode_image(pictures).float().cpu())
        return torch.cat(parts)

    def result(self, sources: Sources, sets: dict[str, Pictures], photos: Pictures | None) -> Evaluation:
        everything = {**sets, **({} if photos is None else {"photos": photos})}
        tables = {
            "data": {
                "name": sources.name,
                "image_size": self.size,
                "preprocess": "white background, shorter side resized (bicubic, antialias), centre crop",
                "pictures": {name: len(pictures) for name, pictures in everything.items()},
                "skipped": {name: pictures.skipped for name, pictures in everything.items() if pictures.skipped},
            },
            **self.tables,
            "protocols": self.protocols,
            "seconds": {part: round(seconds, 3) for part, seconds in self.seconds.items()},
            "images_per_s": {p: round(self.counts[p] / s, 1) for p, s in self.seconds.items() if self.counts[p] and s > 0},
        }
        tables["metrics"] = [metric.to_dict() for metric in headline(tables)]
        tables["figures"] = tables["metrics"]  # the former name, for readers of evaluation.json
        return Evaluation(tables, self.reconstructions, self.rankings, self.captioned)


def _mean_of(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of the leaves over tables of the same layout; counts and strings are taken from the first."""
    first = tables[0]
    mean: dict[str, Any] = {}
    for key, value in first.items():
        if isinstance(value, dict):
            mean[key] = _mean_of([table[key] for table in tables])
        elif isinstance(value, float):
            mean[key] = sum(table[key] for table in tables) / len(tables)
        else:
            mean[key] = value
    return mean


def _join(parts: list[Pictures]) -> Pictures:
    return Pictures(
        torch.cat([part.images for part in parts]),
        [key for part in parts for key in part.keys],
        [captions for part in parts for captions in part.captions],
        [meta for part in parts for meta in part.meta],
        {},
    )
