"""ov3fast encode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ov3fast.cli.options import parse


@dataclass
class Encode:
    """Images to pooled vectors and tokens."""

    model: tyro.conf.Positional[str]
    """Model folder or hub id, or the folder of a released vision tower (open_clip_config.json)."""
    images: tyro.conf.Positional[tuple[Path, ...]]
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
    from ov3fast.inference import encode, load_model, write_embeddings

    model = load_model(given.model, vae=given.vae, device=given.device)
    found = encode(
        model, given.images, image_size=given.image_size, batch_size=given.batch_size, workers=given.workers, progress=True
    )
    path = write_embeddings(given.out, found)
    for name, reason in found.skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{len(found.names)} images -> {path}")
    return 0
