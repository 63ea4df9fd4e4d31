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
    """Share of the images; the sources' fractions are normalised, and kept as `data.mixing` says."""
    group_by: str | None = None
    """Metadata field that names the concept: the source is then drawn by concept, `views` different samples of each."""
    views: int = 1
    """Images of one text in a batch. A concept with fewer samples repeats one with another augmentation."""
    paired: bool = True
    """False: images without text, for the reconstruction branch only."""
    captions: tuple[tuple[str, float], ...] = (("name", 0.5), ("caption", 0.5))
    """Caption keys and their probabilities for the contrastive text. A text shared by several different samples is one
    that all of them have, where there is such a one."""
    caption_key: str = "caption"
    """Caption that the captioner learns; where a sample lacks it, the contrastive text is taken."""

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
    """Names the order, the crops, the backgrounds and the captions."""
    crop: Literal["inception", "center"] = "inception"
    """Training crop. Evaluation always resizes and crops the centre."""
    min_area: float = 0.4
    """Smallest share of the picture that an inception crop takes."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling filter; both antialias."""
    flip: bool = False
    """Flip half of the images horizontally."""
    background: Literal["random", "white", "mixed"] = "random"
    """Background of transparent images in training: a random plain colour, white as in evaluation, or mixed (three variants of
    four on white)."""
    mixing: Literal["batch", "stream"] = "batch"
    """"batch": every batch holds the same number of each source, its fraction rounded where it doesn't divide, and ranks must divide
    it. "stream": the fractions hold to less than one sample over any beginning of the stream (1.7 for five sources or more with over six
    decimals), whatever batch and ranks; for sources with one view that are all paired or none."""
    variants: int | None = None
    """Number of different augmentations of a sample, which repeat after that many passes (so that latents can be
    cached); None: a new one every time."""
    latents: str | None = None
    """Folder that `ov3fast data encode` filled: each stage reads the VAE's moments of its size there in place of the images, and
    images only for pixel losses. Needs variants; None: images are encoded as they come."""
    decode: Literal["full", "fast"] = "full"
    """"fast": JPEGs whose crop has at least twice, four or eight times the wanted pixels a side are decoded at a half, a quarter or an eighth of
    their size, crops lie on whole pixels, and PyTorch resizes them. For sources with one view; other files are decoded as by "full"."""
    cache_images: bool = False
    """Decode everything once at the start and keep it in memory."""
    workers: int = 0
    """Processes that make batches ahead of time; 0: in the training process. The batches do not depend on it."""
    threads: int = 1
    """Threads of each process that read, decode and crop; the batches do not depend on it. Behind URLs 16 and more hide their
    latency."""
    cache_dir: str | None = None
    """Folder that keeps whole tars behind URLs; None: the bytes of each sample are fetched when it is read."""
    cache_gib: float = 100.0
    """How much cache_dir may hold; two windows of shards at the least."""
    read_ahead: int = 0
    """Steps ahead of which tars are brought into cache_dir."""
    shard_window: int = 0
    """Mix the samples of this many shards at a time; 0: of all (see data.order)."""
    skip_budget: float = 0.01
    """Largest share of the samples that may be skipped as broken, captionless, too large or cut off."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pictures with more pixels are skipped without being decoded."""

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
            raise ValueError(
                'decode: "fast" decodes for one crop, cache_images keeps whole pictures for all; leave one of them out'
            )
        if self.decode == "fast" and any(source.views > 1 for source in self.sources):
            raise ValueError('decode: "fast" takes sources with one view of a text')
