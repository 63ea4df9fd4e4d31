"""`ov3fast.optimize` against eager PyTorch, torch.compile, OpenVINO and onnxruntime on models with random weights: benches/results/optimize.csv.

    python -m benches.optimize                       # all models whose libraries are installed; other rows are kept
    python -m benches.optimize --resume              # only the rows that the file lacks
    python -m benches.optimize --only clip,siglip --warm     # only compiles, to warm the caches for a later run

Variants are interleaved in one process; ratio_quartiles are of the ratios round by round, in which the machine's drift cancels. int8's ratio is to the fastest of all others in bfloat16. OpenVINO runs in the row's dtype, onnxruntime in float32
alone (its CPU kernels have no bfloat16). timm needs the environment of `make test-doors`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ov3fast
from benches import timing
from ov3fast import ops
from ov3fast.inference import VisionTower
from ov3fast.inference.kinds import caller, kind_of, roots
from ov3fast.interop._programs import decompositions, parts_of, program
from ov3fast.io import atomic_write
from ov3fast.models.config import VisionConfig
from ov3fast.models.vae import FLUX_VAE, FrozenVAE
from ov3fast.models.vit import ViTEncoder

RESULTS = Path(__file__).parent / "results" / "optimize.csv"
PEERS = ("eager", "compile", "openvino", "onnxruntime")
PAUSE = 0.2
"""Seconds before a run: onnxruntime's threads spin for some 50 ms after theirs."""
HEAD = (
    "model",
    "batch",
    "dtype",
    "ours_ms",
    *(f"{peer}_ms" for peer in PEERS),
    "best_peer",
    "ratio",
    "ratio_quartiles",
    "rounds",
    "chip",
    "threads",
    "versions",
)


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
    whole: bool = False
    """Not cut to --layers."""


CASES = {
    "clip": Case("transformers CLIP ViT-B/16", _clip),
    "siglip": Case("transformers SigLIP-B/16", _siglip),
    "dinov2": Case("transformers DINOv2-B/14", _dinov2),
    "timm": Case("timm ViT-B/16", _timm),
    "tower": Case("OpenVision 3 B/2, 256 px, small VAE", _own, (1, 8)),
    "flux": Case("FLUX-size VAE, encode and decode, 256 px", _flux, whole=True),
}


class Plain(nn.Module):
    """A model as other runtimes take it: images -> its results, by PyTorch's operators alone."""

    def __init__(self, model: Any, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = model.vae if isinstance(model, FrozenVAE) else model

    def forward(self, images: torch.Tensor) -> Any:
        if self.kind == "autoencoder":
            return self.inner.decode(self.inner.encode(images).latent_dist.mean).sample
        if self.kind == "transformers":
            return self.inner(pixel_values=images).last_hidden_state
        return self.inner(images)


def exported(model: Any, kind: str, images: torch.Tensor) -> Any:
    """The model as a torch.export program without operators of ours, for this batch alone."""
    if kind == "ov3fast":
        part = dataclasses.replace(parts_of(model)[0], example=images, free={})
        return program(part)
    with ops.use("eager"):
        return torch.export.export(Plain(model, kind), (images,), strict=False).run_decompositions(decompositions())


def variants(model: Any, dtype: torch.dtype, batch: int, wanted: Container[str]) -> dict[str, Callable[[], object]]:
    """Name -> a call of the model in that variant, prepared and run once."""
    kind = kind_of(model)
    side = 256 if kind in ("ov3fast", "autoencoder") else 224
    wide = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base = model if dtype == torch.float32 else converted(model, dtype)
    images = wide if kind in ("ov3fast", "autoencoder") else wide.to(dtype)
    call = caller(base, kind, images)
    made: dict[str, Callable[[], object]] = {}

    def eager() -> object:
        with ops.use("eager"):
            return call(base)

    made["eager"] = eager
    if "compile" in wanted:
        made["compile"] = _compiled(base, kind, wide if kind == "ov3fast" else wide.to(dtype))
    if "openvino" in wanted:
        made["openvino"] = _openvino(model, kind, dtype, wide)
    if "onnxruntime" in wanted and dtype == torch.float32:
        made["onnxruntime"] = _onnxruntime(model, kind, wide)
    fast = ov3fast.optimize(base, mode="ours", calibration=images)
    made["ours"] = lambda: call(fast)
    if dtype == torch.bfloat16:
        small = ov3fast.optimize(model, dtype=torch.int8, calibration=wide[:1])
        made["int8"] = lambda: call(small)
    for run in made.values():
        run()
    return made


def _compiled(base: Any, kind: str, images: torch.Tensor) -> Callable[[], object]:
    # Our operators are single nodes to the compiler, which could fuse nothing.
    own = kind in ("ov3fast", "autoencoder")
    compiled = torch.compile(exported(base, kind, images).module() if own else Plain(base, kind), dynamic=False)
    return lambda: compiled(images)


def _openvino(model: Any, kind: str, dtype: torch.dtype, images: torch.Tensor) -> Callable[[], object]:
    import openvino

    made = openvino.convert_model(exported(model, kind, images))
    options = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(made, "CPU", options).create_infer_request()
    given = images.numpy()
    return lambda: request.infer([given], share_inputs=True, share_outputs=True)


def _onnxruntime(model: Any, kind: str, images: torch.Tensor) -> Callable[[], object]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        made: Any = torch.onnx.export(exported(model, kind, images), (), dynamo=True, opset_version=20, verbose=False)
        made.save(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)


def converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy in `dtype`, its autoencoder too."""
    made = copy.deepcopy(model)
    for _, tree in roots(made):
        tree.to(dtype)
    return made


def rows(name: str, given: argparse.Namespace) -> Iterable[dict[str, Any]]:
    case, layers = CASES[name], given.layers
    label = case.label if case.whole or layers == 12 else f"{case.label}, {layers} blocks"
    left = [
        (batch, word)
        for batch in (case.batches if given.batch is None else (given.batch,))
        for word in given.dtypes.split(",")
        if not (given.resume and (label, str(batch), word) in standing())
    ]
    if not left:
        return
    torch.manual_seed(0)
    model = case.build(layers).eval().requires_grad_(False)
    for batch, word in left:
        with torch.no_grad():
            made = variants(model, getattr(torch, word), batch, wanted(given))
            if given.warm:
                continue
            taken = timing.interleaved(made, given.seconds, least=given.least, pause=PAUSE)
        peers = {key: taken[key] for key in PEERS if key in taken}
        yield _row(label, batch, word, taken["ours"], peers)
        if "int8" in taken:
            yield _row(label, batch, "int8", taken["int8"], {**peers, "ours": taken["ours"]})


def wanted(given: argparse.Namespace) -> set[str]:
    """The peers that are asked for and installed."""
    asked = set(given.peers.split(","))
    return {peer for peer in asked if peer in ("eager", "compile") or importlib.util.find_spec(peer) is not None}


def _row(label: str, batch: int, dtype: str, ours: list[float], others: dict[str, list[float]]) -> dict[str, Any]:
    """ours, others: seconds, round by round. The peers of int8 ran in bfloat16 and have a row of their own."""
    median = {name: statistics.median(seconds) for name, seconds in others.items()}
    best = min(median, key=median.__getitem__)
    ratios = timing.quartiles([theirs / mine for theirs, mine in zip(others[best], ours, strict=True)])
    peers = {} if dtype == "int8" else median
    names = [name for name in ("openvino", "onnxruntime") if name in peers]
    versions = [f"torch {torch.__version__}", *(f"{name} {importlib.metadata.version(name)}" for name in names)]

    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1e3:.1f}"

    return {
        "model": label, "batch": batch, "dtype": dtype, "ours_ms": ms(statistics.median(ours)),
        **{f"{peer}_ms": ms(peers.get(peer)) for peer in PEERS},
        "best_peer": f"{best}, bfloat16" if dtype == "int8" else best, "ratio": f"{median[best] / statistics.median(ours):.2f}",
        "ratio_quartiles": f"{ratios[0]:.2f} to {ratios[2]:.2f}", "rounds": len(ours), "chip": timing.machine()["cpu"],
        "threads": torch.get_num_threads(), "versions": ", ".join(versions),
    }  # fmt: skip


def standing() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(model, batch, dtype) -> its row in the file."""
    if not RESULTS.is_file():
        return {}
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return {(row["model"], row["batch"], row["dtype"]): row for row in csv.DictReader(file)}


def write(new: list[dict[str, Any]]) -> None:
    """Rows of the same model, batch and dtype are replaced; the file is in the order of CASES."""
    known = standing() | {(row["model"], str(row["batch"]), row["dtype"]): row for row in new}
    labels = [case.label for case in CASES.values()]
    order = sorted(known, key=lambda key: (next(i for i, label in enumerate(labels) if key[0].startswith(label)), int(key[1])))
    with atomic_write(RESULTS) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEAD)
        writer.writeheader()
        writer.writerows(known[key] for key in order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated models")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of timing per model, batch and dtype")
    parser.add_argument("--least", type=int, default=3, help="minimum number of rounds")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, help="default: the model's own list")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated; those that are installed run, eager always")
    parser.add_argument("--resume", action="store_true", help="only the rows that the file lacks")
    parser.add_argument("--warm", action="store_true", help="only compile, to warm the caches")
    given = parser.parse_args()
    for name in given.only.split(","):
        began = time.perf_counter()
        try:
            for row in rows(name, given):
                write([row])
                print(*(f"{row[key]}" for key in HEAD[:12]), sep=", ", flush=True)
        except ImportError as missing:
            print(f"{name}: skipped, {missing}")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
