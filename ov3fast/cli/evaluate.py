"""ov3fast evaluate."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ov3fast.cli.options import parse
from ov3fast.io import atomic_write, check_writable, check_writable_folder


@dataclass
class Evaluate:
    """Evaluate a model on held-out data and write report.html and evaluation.json."""

    model: tyro.conf.Positional[Path]
    """A training run's folder, or a model folder (config.json + model.safetensors)."""
    data: str | None = None
    """A folder, tar or glob pattern of shards; or "demo": the held-out parts of the demo set, which is built once from packages
    downloaded with pip, npm and apt-get. Required."""
    out: Path | None = None
    """Folder for the report; default: the model's or the run's."""
    vae: str | None = None
    """VAE to use instead of the model's: a folder, a hub id, or "small"."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    beams: int = 3
    """Beam search width for captions; 1 is greedy."""
    pictures: int = 64
    """Number of captioned pictures to reconstruct."""
    skip_budget: float = 0.1
    """Largest fraction of samples that may be unreadable."""
    fashion_mnist: Path | None = None
    """Folder of Fashion-MNIST's idx files for the linear probe; default: the demo set's."""
    lpips_backbone: Literal["vgg16", "alexnet", "squeezenet"] = "squeezenet"
    """Network for the perceptual distance. Without --lpips-weights, SqueezeNet's come from a package ("LPIPS-style"), if --data is demo or
    the package was downloaded before."""
    lpips_weights: Path | None = None
    """torchvision's weights for that network."""
    lpips_heads: Path | None = None
    """LPIPS' linear heads (.pth, or the wheel of the pip package lpips)."""
    cache_dir: Path | None = None
    """Folder of the demo set; default: $OV3FAST_CACHE or ~/.cache/ov3fast."""


REPORT, TABLES = "report.html", "evaluation.json"


def run(arguments: list[str]) -> int:
    given = parse(Evaluate, arguments, "evaluate")
    out = _checked(given)
    from ov3fast.evaluation import evaluate, print_tables, write_report
    from ov3fast.inference import load_model

    model = load_model(given.model, vae=given.vae)
    result = evaluate(
        model, _data(given), lpips=_lpips(given, model.device), image_size=given.image_size, pictures=given.pictures,
        beams=given.beams, skip_budget=given.skip_budget, fashion_mnist=given.fashion_mnist,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    # Written before anything is printed, so that a closed pipe does not lose the results.
    with atomic_write(out / TABLES) as file:
        file.write_text(json.dumps(result.tables, indent=1) + "\n", encoding="utf-8")
    recipe = given.model / "recipe.json"
    config = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else model.config.to_dict()
    run_dir = given.model if (given.model / "model").is_dir() else None
    report = write_report(out / REPORT, result, run_dir=run_dir, config=config)
    print_tables(result.tables)
    print(f"report: {report}")
    return 0


def _checked(given: Evaluate) -> Path:
    """The folder for the results. Invalid arguments are rejected before any work."""
    if missing := [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"evaluate: the report needs {' and '.join(missing)}: pip install 'ov3fast[eval]'")
    for name, value, least in (("image-size", given.image_size, 1), ("pictures", given.pictures, 0), ("beams", given.beams, 1)):
        if value is not None and value < least:
            raise ValueError(f"evaluate: --{name} must be at least {least}, got {value}")
    if not 0 <= given.skip_budget <= 1:
        raise ValueError(f"evaluate: --skip-budget takes a share from 0 to 1, got {given.skip_budget:g}")
    if given.out is None and not given.model.is_dir():
        raise FileNotFoundError(
            f"evaluate: there is no folder {given.model}; for a model from the hub give --out, the report's folder"
        )
    out = check_writable_folder(given.out or given.model, "--out")
    for name in (REPORT, TABLES):
        check_writable(out / name, "--out")
    return out


def _data(given: Evaluate) -> Any:
    if given.data is None:
        raise ValueError(
            "evaluate: give --data, a folder, tar or glob pattern of shards; or --data demo, which downloads the demo set's packages "
            "(pip, npm, apt-get) if necessary"
        )
    if given.data != "demo":
        return given.data
    from ov3fast.data.assets import ASSETS, default_cache_dir
    from ov3fast.data.demo import build_demo

    cache = given.cache_dir or default_cache_dir()
    if not (cache / "demo" / "manifest.json").is_file():
        print(
            f"--data demo: downloads up to {len(ASSETS)} packages (pip, npm, apt-get) and builds the demo set in {cache}",
            flush=True,
        )
    return build_demo(given.cache_dir)


def _lpips(given: Evaluate, device: Any) -> Any:
    """The perceptual distance, or None if its weights would have to be downloaded for data other than the demo's."""
    from ov3fast.data.assets import ASSETS, default_cache_dir, fetch
    from ov3fast.models.config import LPIPSConfig
    from ov3fast.models.perceptual import build_lpips

    packages = [default_cache_dir() / "packages" / ASSETS[name].file for name in ("squeezenet", "lpips")]
    if given.data != "demo" and given.lpips_weights is None and not all(file.is_file() for file in packages):
        warnings.warn(
            "LPIPS-style is not computed: give --lpips-weights and --lpips-heads, or run `ov3fast data demo` once", stacklevel=2
        )
        return None
    return build_lpips(LPIPSConfig(given.lpips_backbone, given.lpips_weights, given.lpips_heads), device, fetch)
