"""ov3fast reconstruct."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ov3fast.cli.options import ModelOptions, parse


@dataclass(kw_only=True)
class Reconstruct(ModelOptions):
    """Reconstruct an image through the VAE, the encoder and both decoders; a folder of images becomes a folder of PNG files."""

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file, or a folder of images."""
    out: Path
    """Image file to write (.png), or a folder if IMAGE is one."""
    size: int | None = None
    """Side of the square that the image is resized and cropped to; default: the model's."""
    keep_size: bool = False
    """Don't resize; only crop the sides to multiples of 16 pixels."""
    side_by_side: bool = False
    """Write original, reconstruction and error map side by side."""


def run(arguments: list[str]) -> int:
    given = parse(Reconstruct, arguments, "reconstruct")
    from ov3fast.inference import load_model, reconstruct_file, reconstruct_files
    from ov3fast.inference.reconstruct import check_out
    from ov3fast.io import check_writable_folder

    folder = given.image.is_dir()
    check_writable_folder(given.out, "--out") if folder else check_out(given.out, "--out")
    options = {"size": given.size, "keep_size": given.keep_size, "side_by_side": given.side_by_side}
    model = load_model(given.model, vae=given.vae, device=given.device)
    if not folder:
        found = reconstruct_file(model, given.image, given.out, **options)
        print(f"{given.image} -> {given.out}: {found.psnr:.2f} dB (VAE alone {found.vae_psnr:.2f} dB)")
        return 0
    psnrs, skipped = [], 0
    for one in reconstruct_files(model, given.image, given.out, **options):
        if one.found is None:
            skipped += 1
            continue
        psnrs.append((one.found.psnr, one.found.vae_psnr))
        print(f"{one.name} -> {one.out}: {one.found.psnr:.2f} dB (VAE alone {one.found.vae_psnr:.2f} dB)", flush=True)
    if not psnrs:
        raise ValueError(f"reconstruct: none of the {skipped} images could be read")
    mean, alone = map(statistics.fmean, zip(*psnrs, strict=True))
    print(f"{len(psnrs)} images -> {given.out}: mean {mean:.2f} dB (VAE alone {alone:.2f} dB)")
    return 0
