"""ov3fast evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ov3fast.cli.options import parse


@dataclass
class Evaluate:
    """Measure a model on held-out data and write report.html and evaluation.json."""

    model: tyro.conf.Positional[Path]
    """A training run's folder, or a model folder (config.json + model.safetensors)."""
    data: str = "demo"
    """"demo" (the demo set's held-out parts), or a folder, tar or glob pattern of shards."""
    out: Path | None = None
    """Folder for the report; default: the given one."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    beams: int = 3
    """Beams of the captions; 1 is greedy."""
    pictures: int = 64
    """Captioned pictures that are reconstructed."""
    fashion_mnist: Path | None = None
    """Folder of Fashion-MNIST's idx files for the linear probe; default: the demo set's."""
    lpips_backbone: Literal["vgg16", "alexnet", "squeezenet"] = "squeezenet"
    """Network of the perceptual distance. Without weights the demo set's SqueezeNet is taken ("LPIPS-style")."""
    lpips_weights: Path | None = None
    """torchvision's weights of that network."""
    lpips_heads: Path | None = None
    """LPIPS' linear heads (.pth, or the wheel of the pip package lpips)."""
    cache_dir: Path | None = None
    """Where the demo set lies; default: $OV3FAST_CACHE or ~/.cache/ov3fast."""


def run(arguments: list[str]) -> int:
    given = parse(Evaluate, arguments, "evaluate")
    import json

    from ov3fast.data.demo import build_demo
    from ov3fast.evaluation import evaluate as measure
    from ov3fast.evaluation import print_tables, write_report
    from ov3fast.inference import load_model
    from ov3fast.recipes import LPIPSConfig
    from ov3fast.training.build import build_lpips

    run_dir = given.model if (given.model / "model").is_dir() else None
    model = load_model(given.model, vae=given.vae)
    lpips = build_lpips(LPIPSConfig(given.lpips_backbone, given.lpips_weights, given.lpips_heads), model.device)
    data = build_demo(given.cache_dir) if given.data == "demo" else given.data
    result = measure(
        model, data, lpips=lpips, image_size=given.image_size, pictures=given.pictures, beams=given.beams,
        fashion_mnist=given.fashion_mnist,
    )  # fmt: skip
    print_tables(result.tables)
    out = given.out or given.model
    out.mkdir(parents=True, exist_ok=True)
    recipe = given.model / "recipe.json"
    config = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else model.config.to_dict()
    report = write_report(out / "report.html", result, run_dir=run_dir, config=config)
    (out / "evaluation.json").write_text(json.dumps(result.tables, indent=1) + "\n", encoding="utf-8")
    print(f"report: {report}")
    return 0
