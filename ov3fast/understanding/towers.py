"""Frozen vision towers behind one interface, so baselines share the harness: OpenVision 3; CLIP and SigLIP by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ov3fast.evaluation.pictures import evaluation_view
from ov3fast.inference.hidden_states import hidden_states
from ov3fast.inference.load import load_model
from ov3fast.models import pretrained
from ov3fast.models.vit import ViTEncoder

GREY = (128, 128, 128)
CLIP_STATISTICS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALF = ([0.5] * 3, [0.5] * 3)


@dataclass(frozen=True)
class Tower:
    """forward: pixels [B, 3, S, S], normalized by mean and std -> features [B, tokens, width]."""

    name: str
    image_size: int
    tokens: int
    width: int
    forward: Callable[[Tensor], Tensor]
    mean: list[float]
    std: list[float]
    device: torch.device
    aspect: str

    def view(self, image: Image.Image) -> Tensor:
        """uint8 [3, S, S]: the image, padded or cropped to a square."""
        if self.aspect == "pad":
            image = padded(image)
        return evaluation_view(image, self.image_size)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 [B, tokens, width] on the tower's device."""
        pixels = images.to(self.device, torch.float32) / 255
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return self.forward((pixels - mean) / std).float()


def padded(image: Image.Image) -> Image.Image:
    """The image centred on a grey square, as in LLaVA-1.5; transparency is composited onto white first."""
    if image.width == image.height:
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        upper = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper)
    side = max(image.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def load_tower(
    path: str | Path,
    *,
    layer: int = -2,
    aspect: str = "pad",
    vae: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Tower:
    """A tower from a folder or hub id; its type is inferred from the files.

    ValueError for a nonexistent layer or an unusable device; FileNotFoundError as in `load_model`.
    """
    device = pretrained.check_device(device, "tower") or torch.device("cpu")
    kind = kind_of(path)
    if kind is None:
        return _openvision3(path, layer, aspect, vae, device)
    if vae is not None:
        raise ValueError(f"tower: vae is for OpenVision 3, {path} is of type {kind}")
    return _of_transformers(path, kind, layer, aspect, device)


def kind_of(path: str | Path) -> str | None:
    """transformers' model_type for third-party towers; None for OpenVision 3."""
    what = f"tower {str(path)!r}"
    folder = pretrained.resolve(path, what, ["config.json", "open_clip_config.json", "preprocessor_config.json"])
    config = Path(folder) / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    return kind if isinstance(kind, str) and not kind.startswith("openvision3") else None


def _openvision3(path: str | Path, layer: int, aspect: str, vae: str | Path | None, device: torch.device) -> Tower:
    model = load_model(path, vae=vae, device=device).requires_grad_(False)
    encoder = model if isinstance(model, ViTEncoder) else model.encoder
    config = encoder.config
    _check_layer(layer, config.depth, path)

    def forward(pixels: Tensor) -> Tensor:
        return hidden_states(model, pixels)[1][layer]

    return Tower(str(path), config.image_size, config.grid**2, config.width, forward, *HALF, device, aspect)


def _of_transformers(path: str | Path, kind: str, layer: int, aspect: str, device: torch.device) -> Tower:
    import transformers

    clip = kind.startswith("clip")
    if not clip and kind not in ("siglip", "siglip_vision_model"):
        raise ValueError(f"tower: {path} is of type {kind!r}; towers are OpenVision 3, CLIP and SigLIP")
    classes: Any = transformers.CLIPVisionModel if clip else transformers.SiglipVisionModel
    model = classes.from_pretrained(path).to(device).requires_grad_(False).eval()
    config = model.config
    _check_layer(layer, config.num_hidden_layers, path)

    def forward(pixels: Tensor) -> Tensor:
        state = model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
        return state[:, 1:] if clip else state  # CLIP's first token is CLS

    mean, std = _statistics(path, CLIP_STATISTICS if clip else HALF)
    tokens = (config.image_size // config.patch_size) ** 2
    return Tower(str(path), config.image_size, tokens, config.hidden_size, forward, mean, std, device, aspect)


def _statistics(path: str | Path, usual: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    file = Path(pretrained.resolve(path, f"tower {str(path)!r}", ["preprocessor_config.json"])) / "preprocessor_config.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return given.get("image_mean", usual[0]), given.get("image_std", usual[1])


def _check_layer(layer: int, depth: int, path: str | Path) -> None:
    if not -depth - 1 <= layer <= depth:
        raise ValueError(
            f"tower: feature_layer must be in [{-depth - 1}, {depth}] for the {depth} blocks of {path}, got {layer}"
        )
