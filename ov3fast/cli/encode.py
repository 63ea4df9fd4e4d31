"""ov3fast encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ov3fast.cli.options import parse


@dataclass
class Encode:
    """Images to pooled vectors and tokens."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder or hub id, or the folder of a released vision tower (open_clip_config.json)."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Image files or folders."""
    out: Path
    """File to write: .safetensors (pooled and tokens), or .npy (pooled alone) or .npz."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    batch_size: int = 32
    workers: int = 2
    """Threads that decode the images."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    device: str | None = None


def run(arguments: list[str]) -> int:
    given = parse(Encode, arguments, "encode")
    from ov3fast.data.skips import printable
    from ov3fast.inference import check_output, encode_to_file, load_model

    check_output(given.out)
    model = load_model(given.model, vae=given.vae, device=given.device)
    written = encode_to_file(
        model, given.images, given.out, image_size=given.image_size, batch_size=given.batch_size, workers=given.workers, progress=True
    )  # fmt: skip
    for name, reason in written.skipped.items():
        print(f"skipped {printable(name)}: {reason}")
    print(f"{len(written.names)} images -> {written.path}")
    return 0
