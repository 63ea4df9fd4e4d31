"""Image in, image out: VAE encoder -> ViT encoder -> tokens -> ViT decoder -> VAE decoder, without noise."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ov3fast.inference.images import cropped, read_image, square
from ov3fast.inference.load import VisionTower
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3

if TYPE_CHECKING:
    from PIL import Image

ERROR_GAIN = 4
"""How much brighter than the error itself the error map is."""


@dataclass(frozen=True)
class Reconstructed:
    """uint8 [3, H, W] each: the original as the model saw it, its reconstruction, and that of the VAE alone; PSNR in dB of both."""

    original: Tensor
    reconstruction: Tensor
    vae: Tensor
    psnr: float
    vae_psnr: float

    def image(self) -> Image.Image:
        """The reconstruction as a Pillow image."""
        return _pillow(self.reconstruction)

    def side_by_side(self) -> Image.Image:
        """Original, reconstruction, and ERROR_GAIN times their difference, from left to right."""
        error = (self.reconstruction.int() - self.original.int()).abs() * ERROR_GAIN
        return _pillow(torch.cat([self.original, self.reconstruction, error.clamp(max=255).to(torch.uint8)], dim=2))


@torch.inference_mode()
def reconstruct_image(
    model: OpenVision3, image: Image.Image, *, size: int | None = None, keep_size: bool = False, interpolation: str = "bicubic"
) -> Reconstructed:
    """Reconstructs one Pillow image (RGB or RGBA, laid on white).

    size: the shorter side is resized to it and the centre cropped to a square; default the model's image_size. keep_size: no
    resizing, only the centre cropped to sides that are multiples of the VAE's stride times the patch. ValueError for a wrong size.
    """
    if isinstance(model, VisionTower):
        raise ValueError("reconstruct: a released vision tower has no decoder; give an OpenVision3")
    vision = model.config.vision
    stride = VAE_STRIDE * vision.patch_size
    if keep_size and size is not None:
        raise ValueError(f"reconstruct: give size or keep_size, not both; got size {size}")
    if size is not None and (size < stride or size % stride):
        raise ValueError(f"reconstruct: size must be a positive multiple of {stride} pixels, got {size}")
    picture = cropped(image, stride) if keep_size else square(image, size or vision.image_size, interpolation)
    latents = model.latents(picture[None].to(model.device))
    _, tokens = model.encode(latents.to(model.encoder.cls_token.dtype))
    latents_hat = model.decode(tokens, (latents.shape[2] // vision.patch_size, latents.shape[3] // vision.patch_size))
    original = _to_uint8(picture)
    found, alone = (_to_uint8(model.decode_latents(z.float())[0].cpu()) for z in (latents_hat, latents))
    return Reconstructed(original, found, alone, _psnr(found, original), _psnr(alone, original))


def reconstruct_file(
    model: OpenVision3,
    image: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    keep_size: bool = False,
    side_by_side: bool = False,
) -> Reconstructed:
    """Reconstructs an image file into the PNG file `out`, written whole or not at all; folders are made.

    side_by_side: original, reconstruction and error map in one picture. FileNotFoundError for a missing image, ValueError for an
    unreadable one or an `out` that doesn't end in .png.
    """
    image, out = Path(image), Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"reconstruct: out must end in .png, got {out}")
    if not image.is_file():
        raise FileNotFoundError(f"reconstruct: there is no image file {image}")
    try:
        picture = read_image(image)
    except ValueError as error:
        raise ValueError(f"reconstruct: can't read {image}: {error}") from None
    found = reconstruct_image(model, picture, size=size, keep_size=keep_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        (found.side_by_side() if side_by_side else found.image()).save(temporary, "PNG")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _to_uint8(picture: Tensor) -> Tensor:
    return ((picture.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def _psnr(picture: Tensor, original: Tensor) -> float:
    """Data range 255 on 8-bit pictures; infinite for equal ones."""
    error = (picture.double() - original.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _pillow(picture: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
