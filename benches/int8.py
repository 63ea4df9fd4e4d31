"""The accuracy of `ov3fast.optimize(dtype=torch.int8)` beside bfloat16's: benches/results/int8.csv.

    python -m benches.int8 runs/demo

Calibrated on scikit-image's photos, the default. Measured on photos that it was not calibrated on (the demo set's from foolbox): the worst token and the worst photo, relative
to float32 and to bfloat16. Retrieval is on the demo set's pictures in a held-out style. The FLUX-size VAE has random weights.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ov3fast
from benches.optimize import converted
from benches.timing import machine
from ov3fast.data import ShardDataset
from ov3fast.data.demo import build_demo
from ov3fast.evaluation import evaluate
from ov3fast.inference import load_model
from ov3fast.inference.photos import package_photos
from ov3fast.io import atomic_write
from ov3fast.models.vae import FLUX_VAE, FrozenVAE

RESULTS = Path(__file__).parent / "results" / "int8.csv"
FIELDS = ("what", "count", "float32", "bfloat16", "int8", "int8_to_bfloat16", "chip", "torch", "commit")
FLUX_PHOTOS = 2
"""For calibration, and others to measure on: each takes a dozen seconds in float32."""


def dtypes(model: Any, calibration: Tensor | None = None) -> dict[str, Any]:
    """The model in each dtype; int8 as a user gets it, with the convolutions wide that measure faster so."""
    return {
        "float32": model,
        "bfloat16": converted(model, torch.bfloat16),
        "int8": ov3fast.optimize(model, dtype=torch.int8, calibration=calibration),
    }


def photos(size: int, most: int | None = None) -> Tensor:
    """float32 [N, 3, size, size]: the demo set's held-out photos but scikit-image's, which calibrate."""
    dataset = ShardDataset(build_demo().photos_heldout)
    samples = [dataset[i] for i in range(len(dataset))]
    return ov3fast.preprocess([sample.image for sample in samples if not sample.key.startswith("skimage")][:most], size)


def retrieval(models: dict[str, Any]) -> list[dict[str, str]]:
    """Percent right among the first 1 and 10, of pictures in a style that training did not see."""
    found = {
        name: evaluate(model, build_demo().pairs_style, pictures=0, captions=0, progress=False).tables["retrieval"]["data"]
        for name, model in models.items()
    }
    rows = []
    for direction in ("image_to_text", "text_to_image"):
        for rank in ("R@1", "R@10"):
            values = {name: f"{100 * table[direction][rank]:.1f} %" for name, table in found.items()}
            words = direction.replace("_", " ")
            rows.append({"what": f"{rank}, {words}", "count": str(found["float32"]["images"]), **values})
    return rows


def cosine(got: Tensor, expected: Tensor) -> float:
    """The least of all tokens."""
    return float(torch.cosine_similarity(got, expected, dim=-1).min())


def psnr(got: Tensor, expected: Tensor) -> float:
    """The least of all images [N, 3, H, W] in [-1, 1], dB."""
    return float(10 * torch.log10(4 / (got - expected).square().mean((1, 2, 3))).min())


def nearness(
    what: str,
    models: dict[str, Any],
    images: Tensor,
    output: Callable[[Any, Tensor], Tensor],
    measure: Callable[[Tensor, Tensor], float],
    form: str,
) -> dict[str, str]:
    """The row of an output of the models, image by image, relative to float32's and to bfloat16's."""
    with torch.no_grad():
        got = {name: torch.cat([output(model, image[None]).float() for image in images]) for name, model in models.items()}
    return {
        "what": what, "count": str(len(images)), "bfloat16": format(measure(got["bfloat16"], got["float32"]), form),
        "int8": format(measure(got["int8"], got["float32"]), form),
        "int8_to_bfloat16": format(measure(got["int8"], got["bfloat16"]), form),
    }  # fmt: skip


def tokens(model: Any, images: Tensor) -> Tensor:
    found: Tensor = model.encode(images)[1]
    return found


def reconstruction(model: Any, images: Tensor) -> Tensor:
    found: Tensor = (
        model.decode(model.encode(images)).clamp(-1, 1) if isinstance(model, FrozenVAE) else model.reconstruct(images)
    )
    return found


def demo(folder: Path) -> list[dict[str, str]]:
    model = load_model(folder)
    side = model.encoder.config.image_size
    own = dtypes(model)
    return [
        *retrieval(own),
        nearness(f"cosine of tokens, {side} px", own, photos(side), tokens, cosine, ".5f"),
        nearness(f"PSNR of the reconstruction, {side} px, dB", own, photos(side), reconstruction, psnr, ".1f"),
    ]


def small(folder: Path) -> list[dict[str, str]]:
    vae = dtypes(FrozenVAE.from_pretrained("small"))
    return [nearness("PSNR of the small VAE's reconstruction, 256 px, dB", vae, photos(256), reconstruction, psnr, ".1f")]


def flux(folder: Path) -> list[dict[str, str]]:
    torch.manual_seed(0)
    calibration = ov3fast.preprocess(package_photos("calibration")[:FLUX_PHOTOS], 256)
    vae = dtypes(FrozenVAE.from_config(FLUX_VAE), calibration)
    return [nearness("PSNR of a FLUX-size VAE's, 256 px, dB", vae, photos(256, FLUX_PHOTOS), reconstruction, psnr, ".1f")]


PARTS = {"demo": demo, "small": small, "flux": flux}


def write(new: list[dict[str, str]]) -> None:
    """Rows of the same name are replaced."""
    former = []
    if RESULTS.is_file():
        with RESULTS.open(encoding="utf-8", newline="") as file:
            former = list(csv.DictReader(file))
    facts = {name: value for name, value in machine().items() if name in FIELDS} | {"chip": machine()["cpu"]}
    rows = {row["what"]: row for row in [*former, *(row | facts for row in new)]}
    with atomic_write(RESULTS) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run of `make demo`")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated; other rows are kept")
    given = parser.parse_args()
    for name in given.only.split(","):
        made = PARTS[name](given.model)
        write(made)
        for row in made:
            print(*row.values(), sep=", ", flush=True)


if __name__ == "__main__":
    main()
