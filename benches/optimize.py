"""`ov3fast.optimize` against eager PyTorch and torch.compile on models with random weights: benches/results/optimize.csv.

    python -m benches.optimize                       # all models whose libraries are installed; other rows are kept
    python -m benches.optimize --only clip,siglip --warm     # only compiles, to warm the caches for a later run

Variants are interleaved in one process. int8's ratio is to the fastest of all others in bfloat16. Models are cut to --layers blocks, since blocks are alike.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ov3fast
from benches import timing
from ov3fast import ops
from ov3fast.inference import VisionTower
from ov3fast.inference.kinds import caller, kind_of
from ov3fast.io import atomic_write
from ov3fast.models.config import VisionConfig
from ov3fast.models.vae import FLUX_VAE, FrozenVAE
from ov3fast.models.vit import ViTEncoder

RESULTS = Path(__file__).parent / "results" / "optimize.csv"
HEAD = ("model", "batch", "dtype", "ours_ms", "eager_ms", "compile_ms", "best_peer", "ratio", "chip", "threads", "versions")


def _clip(layers: int) -> nn.Module:
    import transformers

    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12, patch_size=16
        )
    )


def _siglip(layers: int) -> nn.Module:
    import transformers

    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12, patch_size=16
        )
    )


def _dinov2(layers: int) -> nn.Module:
    import transformers

    return transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=768, num_hidden_layers=layers, num_attention_heads=12, patch_size=14, image_size=224
        )
    )


def _timm(layers: int) -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", depth=layers, num_classes=0)


def _own(layers: int) -> nn.Module:
    """256 px images -> tokens, with the small VAE."""
    encoder = ViTEncoder(VisionConfig(width=768, depth=layers, heads=12, mlp_dim=3072, image_size=256, embed_dim=768))
    return VisionTower(encoder, FrozenVAE.from_pretrained("small"))


def _flux(layers: int) -> nn.Module:
    return FrozenVAE.from_config(FLUX_VAE)


@dataclass(frozen=True)
class Case:
    label: str
    build: Callable[[int], nn.Module]
    batches: tuple[int, ...] = (1,)
    compiles: bool = True
    whole: bool = False
    """Not cut to --layers."""


CASES = {
    "clip": Case("transformers CLIP ViT-B/16", _clip),
    "siglip": Case("transformers SigLIP-B/16", _siglip),
    "dinov2": Case("transformers DINOv2-B/14", _dinov2),
    "timm": Case("timm ViT-B/16", _timm),
    "tower": Case("OpenVision 3 B/2, 256 px, small VAE", _own, (1, 8)),
    "flux": Case("FLUX-size VAE, encode and decode, 256 px", _flux, compiles=False, whole=True),
}


def variants(model: Any, dtype: torch.dtype, batch: int, compiles: bool) -> dict[str, Callable[[], object]]:
    """Name -> a call of the model in that variant, already run once."""
    kind = kind_of(model)
    side = 256 if kind in ("ov3fast", "autoencoder") else 224
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = model if dtype == torch.float32 else _converted(model, dtype)
    images = images if kind in ("ov3fast", "autoencoder") else images.to(dtype)
    call = caller(base, kind, images)
    made: dict[str, Callable[[], object]] = {}

    def eager() -> object:
        with ops.use("eager"):
            return call(base)

    made["eager"] = eager
    if compiles:
        with ops.use("eager"):
            compiled = torch.compile(lambda: call(base), dynamic=False)
            compiled()

        def compile_() -> object:
            with ops.use("eager"):
                return compiled()

        made["compile"] = compile_
    fast = ov3fast.optimize(base, mode="ours", calibration=images)
    made["ours"] = lambda: call(fast)
    if dtype == torch.bfloat16:
        small = ov3fast.optimize(model, dtype=torch.int8, calibration=images[:1].float())
        made["int8"] = lambda: call(small)
    for run in made.values():
        run()
    return made


def _converted(model: Any, dtype: torch.dtype) -> Any:
    import copy

    made = copy.deepcopy(model).to(dtype)
    if isinstance(made, VisionTower):
        made.encoder.get_vae().vae.to(dtype)
    return made


def rows(name: str, given: argparse.Namespace) -> Iterable[dict[str, Any]]:
    case, layers, warm = CASES[name], given.layers, given.warm
    torch.manual_seed(0)
    model = case.build(layers).eval().requires_grad_(False)
    label = case.label if case.whole or layers == 12 else f"{case.label}, {layers} blocks"
    for batch in case.batches[: 1 if warm else None] if given.batch is None else (given.batch,):
        for dtype in (getattr(torch, word) for word in given.dtypes.split(",")):
            with torch.no_grad():
                made = variants(model, dtype, batch, case.compiles and not given.no_compile)
                if warm:
                    continue
                taken = {
                    key: statistics.median(value)
                    for key, value in timing.interleaved(made, given.seconds, least=given.least).items()
                }
            peers = {key: taken[key] for key in ("eager", "compile") if key in taken}
            best = min(peers, key=peers.__getitem__)
            word = str(dtype).removeprefix("torch.")
            yield _row(label, batch, word, taken["ours"], peers, best, peers[best] / taken["ours"])
            if "int8" in taken:
                others = {**peers, "ours": taken["ours"]}
                best = min(others, key=others.__getitem__)
                yield _row(label, batch, "int8", taken["int8"], {}, f"{best}, bfloat16", others[best] / taken["int8"])


def _row(label: str, batch: int, dtype: str, ours: float, peers: dict[str, float], best: str, ratio: float) -> dict[str, Any]:
    def ms(value: float | None) -> str:
        return "" if value is None else f"{value * 1e3:.1f}"

    return {
        "model": label, "batch": batch, "dtype": dtype, "ours_ms": ms(ours), "eager_ms": ms(peers.get("eager")),
        "compile_ms": ms(peers.get("compile")), "best_peer": best, "ratio": f"{ratio:.2f}",
        "chip": timing.machine()["cpu"], "threads": torch.get_num_threads(), "versions": f"torch {torch.__version__}",
    }  # fmt: skip


def write(new: list[dict[str, Any]]) -> None:
    """Replaces rows with the same model, batch and dtype."""
    before = []
    if RESULTS.is_file():
        with RESULTS.open(encoding="utf-8", newline="") as file:
            before = list(csv.DictReader(file))
    known = {(row["model"], str(row["batch"]), row["dtype"]): row for row in (*before, *new)}
    with atomic_write(RESULTS) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEAD)
        writer.writeheader()
        writer.writerows(known.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated models")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of timing per model, batch and dtype")
    parser.add_argument("--least", type=int, default=3, help="minimum number of rounds")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, help="default: the model's own list")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--warm", action="store_true", help="only compile, to warm the caches")
    given = parser.parse_args()
    for name in given.only.split(","):
        began = time.perf_counter()
        try:
            for row in rows(name, given):
                write([row])
                print(*(f"{row[key]}" for key in HEAD[:9]), sep=", ", flush=True)
        except ImportError as missing:
            print(f"{name}: skipped, {missing}")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
