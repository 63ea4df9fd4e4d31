"""Reconstruction of an image or a folder of images: VAE encoder -> ViT encoder -> tokens -> ViT decoder -> VAE decoder, without noise."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ov3fast.data.preprocess import read_image, square, to_pillow
from ov3fast.data.skips import SkipWarning
from ov3fast.inference.batches import batch_invariant
from ov3fast.inference.images import cropped, find_images
from ov3fast.inference.load import VisionTower
from ov3fast.io import atomic_write, check_writable, check_writable_folder
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3

if TYPE_CHECKING:
    from PIL import Image

    from ov3fast.data.preprocess import ImageLike

ERROR_GAIN = 4
"""Gain of the error map."""


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
        """Original, reconstruction and their difference times ERROR_GAIN, from left to right."""
        error = (self.reconstruction.int() - self.original.int()).abs() * ERROR_GAIN
        return _pillow(torch.cat([self.original, self.reconstruction, error.clamp(max=255).to(torch.uint8)], dim=2))


@torch.inference_mode()
def reconstruct_image(
    model: OpenVision3, image: ImageLike, *, size: int | None = None, keep_size: bool = False, interpolation: str = "bicubic"
) -> Reconstructed:
    """Reconstructs one image: a Pillow image, a path, a uint8 array [H, W, 3] or tensor [3, H, W] (laid on white).

    size: the shorter side is resized to it and the centre cropped to a square; default the model's image_size. keep_size: don't
    resize, only centre-crop to sides that are multiples of the VAE's stride times the patch size. ValueError for a wrong size.
    """
    stride = _check(model, size, keep_size)
    vision = model.config.vision
    image = to_pillow(image)
    picture = cropped(image, stride) if keep_size else square(image, vision.image_size if size is None else size, interpolation)
    with batch_invariant(model):
        return reconstruct_batch(model, picture[None])[0]


def reconstruct_batch(model: OpenVision3, pictures: Tensor) -> list[Reconstructed]:
    """Preprocessed images, float32 [B, 3, H, W] in [-1, 1] -> the result of `reconstruct_image` for each."""
    patch = model.config.vision.patch_size
    moments = model.encode_to_moments(pictures)
    latents = model.get_vae().from_moments(moments)
    _, tokens = model.encode_moments(moments)
    latents_hat = model.decode(tokens, (latents.shape[2] // patch, latents.shape[3] // patch))
    found, alone = (_to_uint8(model.decode_latents(z.float()).cpu()) for z in (latents_hat, latents))
    rows = zip(_to_uint8(pictures), found, alone, strict=True)
    return [Reconstructed(own, seen, vae, _psnr(seen, own), _psnr(vae, own)) for own, seen, vae in rows]


def reconstruct_file(
    model: OpenVision3,
    image: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    keep_size: bool = False,
    side_by_side: bool = False,
) -> Reconstructed:
    """Reconstructs an image file into the PNG file `out`, written atomically; folders are created.

    side_by_side: original, reconstruction and error map in one image. FileNotFoundError for a missing image, ValueError for an
    unreadable one or an `out` that doesn't end in .png.
    """
    out = check_out(out)
    image = Path(image).expanduser()
    if not image.is_file():
        raise FileNotFoundError(f"reconstruct: there is no image file {image}")
    if out.resolve() == image.resolve():
        raise ValueError(f"reconstruct: out is the image itself, {image}; name another file")
    try:
        picture = read_image(image)
    except ValueError as error:
        raise ValueError(f"reconstruct: can't read {image}: {error}") from None
    found = reconstruct_image(model, picture, size=size, keep_size=keep_size)
    with atomic_write(out) as file:
        (found.side_by_side() if side_by_side else found.image()).save(file, "PNG")
    return found


class FileResult(NamedTuple):
    """One image of a folder: its name, the PNG file written and its contents; out and found are None if it was skipped."""

    name: str
    out: Path | None
    found: Reconstructed | None
    reason: str = ""


def reconstruct_files(
    model: OpenVision3,
    images: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    keep_size: bool = False,
    side_by_side: bool = False,
) -> Iterator[FileResult]:
    """Reconstructs the images in a folder and its subfolders into PNG files of the same names in the folder `out`, one by one.

    Each is written as soon as it is done. Images that can't be read are skipped with a warning. Errors as in `find_images` and
    `reconstruct_file`, before the first image.
    """
    _check(model, size, keep_size)
    out = check_writable_folder(out)
    files = find_images(images)
    names = _png_names(files)
    originals = {file.resolve() for file in files.values()}
    if clash := next((name for name in names.values() if (out / name).resolve() in originals), None):
        raise ValueError(f"reconstruct: {out / clash} is one of the originals; name another folder")
    return _reconstruct_each(
        model, {name: (file, out / names[name]) for name, file in files.items()}, size, keep_size, side_by_side
    )


def _reconstruct_each(
    model: OpenVision3, files: dict[str, tuple[Path, Path]], size: int | None, keep_size: bool, side_by_side: bool
) -> Iterator[FileResult]:
    for name, (file, target) in files.items():
        try:
            found = reconstruct_file(model, file, target, size=size, keep_size=keep_size, side_by_side=side_by_side)
        except ValueError as error:
            warnings.warn(f"skipped {name}: {error}", SkipWarning, stacklevel=2)
            yield FileResult(name, None, None, str(error))
        else:
            yield FileResult(name, target, found)


def _png_names(names: Iterable[str]) -> dict[str, str]:
    """a/b.jpg -> a/b.png; a/b.jpg.png if two images would share that name."""
    uses = Counter(PurePosixPath(name).with_suffix(".png") for name in names)
    plain = {name: PurePosixPath(name).with_suffix(".png") for name in names}
    return {name: str(path) if uses[path] == 1 else f"{name}.png" for name, path in plain.items()}


def check_out(out: str | Path, what: str = "out") -> Path:
    """The PNG file to write, with ~ expanded. ValueError for another suffix, OSError if it can't be written; `what` is the argument's name."""
    out = Path(out).expanduser()
    if out.suffix.lower() != ".png":
        raise ValueError(f"reconstruct: {what} must end in .png, got {out}")
    return check_writable(out, what)


def _check(model: OpenVision3, size: int | None, keep_size: bool) -> int:
    """The stride: sides must be multiples of it."""
    if isinstance(model, VisionTower):
        raise ValueError("reconstruct: a released vision tower has no decoder; it takes an OpenVision3")
    stride = VAE_STRIDE * model.config.vision.patch_size
    if keep_size and size is not None:
        raise ValueError(f"reconstruct: set either size or keep_size, not both; got size {size}")
    if size is not None and (size < stride or size % stride):
        raise ValueError(f"reconstruct: size must be a positive multiple of {stride} pixels, got {size}")
    return stride


def _to_uint8(picture: Tensor) -> Tensor:
    return ((picture.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def _psnr(picture: Tensor, original: Tensor) -> float:
    """For 8-bit images, with data range 255; infinite if they are equal."""
    error = (picture.double() - original.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _pillow(picture: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
