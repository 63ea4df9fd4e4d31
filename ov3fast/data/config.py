"""What a run is trained on: the sources, how a batch is made of them, and what may be skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ov3fast.data.captions import check_choices
from ov3fast.data.limits import MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples and its share of every batch."""

    path: str
    """Folder of tar shards, a tar, a glob or brace pattern, a wids index (each may be a URL), "demo:<part>" for a part of the demo set,
    or "source:module:function" for a SampleSource of one's own."""
    fraction: float = 1.0
    """Share of the images. Fractions are normalised over the sources; `data.mixing` says how closely they are kept."""
    group_by: str | None = None
    """Metadata field that names the concept: the source is then drawn by concept, `views` different samples of each."""
    views: int = 1
    """Images of one text in a batch. A concept with fewer samples repeats one with another augmentation."""
    paired: bool = True
    """False: images without text, for the reconstruction branch only."""
    captions: tuple[tuple[str, float], ...] = (("name", 0.5), ("caption", 0.5))
    """Caption keys and their probabilities for the contrastive text. For several samples of one concept, a text that all of them
    have is preferred."""
    caption_key: str = "caption"
    """Caption that the captioner learns; samples without it use the contrastive text."""

    def __post_init__(self) -> None:
        if self.fraction <= 0:
            raise ValueError(f"fraction: got {self.fraction}; it takes a number above 0 (leave the source out instead)")
        if self.views < 1:
            raise ValueError(f"views: got {self.views}; it takes 1 or more")
        if self.paired:
            check_choices(self.captions, "captions")


@dataclass(frozen=True)
class DataConfig:
    """All sources of a run and how their images become tensors."""

    sources: tuple[SourceConfig, ...] = ()
    seed: int = 0
    """Determines the order, crops, backgrounds and captions."""
    crop: Literal["inception", "center"] = "inception"
    """Training crop. Evaluation always resizes and crops the centre."""
    min_area: float = 0.4
    """Smallest fraction of the image's area that an inception crop takes."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling filter; both antialias."""
    flip: bool = False
    """Flip half of the images horizontally."""
    background: Literal["random", "white", "mixed"] = "random"
    """Background of transparent images in training: a random plain colour, white as in evaluation, or mixed (three of four
    variants on white)."""
    mixing: Literal["batch", "stream"] = "batch"
    """"batch": every batch has the same number of samples from each source, rounded if its fraction doesn't divide the batch; ranks must
    divide that number. "stream": any prefix of the stream is within one sample of the fractions (1.7 for five or more sources with over
    six decimals), whatever the batch size and ranks; for sources with one view, all paired or none."""
    variants: int | None = None
    """Number of different augmentations of a sample, which repeat after that many passes (so that latents can be
    cached); None: a new one in every pass."""
    latents: str | None = None
    """Folder written by `ov3fast data encode`, from which each stage reads the VAE's moments at its image size; images are read only for
    pixel losses. Needs variants. None: images are encoded during training."""
    decode: Literal["full", "fast"] = "full"
    """"fast": JPEGs whose crop is at least 2, 4 or 8 times too large on each side are decoded at 1/2, 1/4 or 1/8 of
    their size, cropped at whole pixels and resized by PyTorch. For sources with one view; other files are decoded as with "full"."""
    cache_images: bool = False
    """Decode everything once at the start and keep it in memory."""
    workers: int = 0
    """Processes that prefetch batches; 0: the training process makes them itself. The batches don't depend on it."""
    threads: int = 1
    """Threads per process that read, decode and crop; the batches don't depend on it. For shards behind URLs, 16 or more hide the
    latency."""
    cache_dir: str | None = None
    """Folder to cache whole tars from URLs in; None: each sample's bytes are fetched when it is read."""
    cache_gib: float = 100.0
    """Size limit of cache_dir; at least two windows of shards."""
    read_ahead: int = 0
    """How many steps ahead tars are fetched into cache_dir."""
    shard_window: int = 0
    """Shuffle within this many shards at a time; 0: within all of them (see data.order)."""
    skip_budget: float = 0.01
    """Largest fraction of the samples that may be skipped as broken, without caption, too large or truncated."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Images with more pixels are skipped without being decoded."""

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area: got {self.min_area}; it takes a share above 0 and up to 1")
        if self.variants is not None and self.variants < 1:
            raise ValueError(f"variants: got {self.variants}; it takes 1 or more, or None")
        if not 0 <= self.skip_budget <= 1:
            raise ValueError(f"skip_budget: got {self.skip_budget}; it takes a share from 0 to 1")
        if self.max_image_pixels < 1:
            raise ValueError(f"max_image_pixels: got {self.max_image_pixels}; it takes 1 or more")
        for name, least in (("workers", 0), ("threads", 1), ("read_ahead", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; it takes {least} or more")
        if self.cache_gib <= 0:
            raise ValueError(f"cache_gib: got {self.cache_gib}; it takes a number above 0")
        for name, given, known in (
            ("crop", self.crop, ("inception", "center")),
            ("interpolation", self.interpolation, ("bicubic", "bilinear")),
            ("background", self.background, ("random", "white", "mixed")),
            ("mixing", self.mixing, ("batch", "stream")),
            ("decode", self.decode, ("full", "fast")),
        ):
            if given not in known:
                raise ValueError(f"{name}: got {given!r}; it takes {' or '.join(map(repr, known))}")
        if self.decode == "fast" and self.cache_images:
            raise ValueError('decode: "fast" decodes for one crop, but cache_images keeps full images; use one or the other')
        if self.decode == "fast" and any(source.views > 1 for source in self.sources):
            raise ValueError('decode: "fast" takes sources with one view of a text')
