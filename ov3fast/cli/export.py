"""ov3fast export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ov3fast.cli.options import parse


@dataclass
class Export:
    """A model for other libraries: transformers (a folder for AutoModel, with its code) or open_clip (the vision tower as it was released)."""

    format: Annotated[Literal["transformers", "open_clip"], tyro.conf.Positional, tyro.conf.arg(metavar="FORMAT")]
    """transformers or open_clip."""
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, training run, hub id, or the folder of a released vision tower."""
    out: Path
    """Folder to write."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""


def run(arguments: list[str]) -> int:
    given = parse(Export, arguments, "export")
    from importlib import import_module

    from ov3fast.inference import load_model
    from ov3fast.io import check_writable_folder

    check_writable_folder(given.out, "--out")
    door = import_module(f"ov3fast.interop.{given.format}")
    model = load_model(given.model, vae=given.vae, image_size=given.image_size)
    door.export(model, given.out)
    print(f"{given.model} -> {given.out}")
    return 0
