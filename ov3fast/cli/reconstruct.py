"""ov3fast reconstruct."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ov3fast.cli.options import parse


@dataclass
class Reconstruct:
    """Image in, image out, through the VAE, the encoder and both decoders."""

    model: tyro.conf.Positional[str]
    """Model folder or hub id."""
    image: tyro.conf.Positional[Path]
    out: Path
    """Image file to write (.png)."""
    size: int | None = None
    """Side of the square that the image is resized and cropped to; default: the model's."""
    keep_size: bool = False
    """No resizing: only the sides are cropped to multiples of 16 pixels."""
    side_by_side: bool = False
    """Write original, reconstruction and error map beside each other."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    device: str | None = None


def run(arguments: list[str]) -> int:
    given = parse(Reconstruct, arguments, "reconstruct")
    from ov3fast.inference import load_model, reconstruct_file

    model = load_model(given.model, vae=given.vae, device=given.device)
    found = reconstruct_file(
        model, given.image, given.out, size=given.size, keep_size=given.keep_size, side_by_side=given.side_by_side
    )
    print(f"{given.image} -> {given.out}: {found.psnr:.2f} dB (VAE alone {found.vae_psnr:.2f} dB)")
    return 0
