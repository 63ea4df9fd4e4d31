"""ov3fast export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ov3fast.cli.options import parse

CERTIFIED = ("torch", "onnx", "openvino")
"""Formats that are checked against the model on images."""


@dataclass
class Export:
    """A model for other libraries and runtimes.

    transformers: a folder for AutoModel, with its code. open_clip: the vision tower as it was released. torch, onnx, openvino: the parts (image, reconstruct,
    text) as files that need no ov3fast, with a certificate of their errors.
    """

    format: Annotated[
        Literal["transformers", "open_clip", "torch", "onnx", "openvino"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FORMAT"),
    ]
    """transformers, open_clip, torch, onnx or openvino."""
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, training run, hub id, or the folder of a released vision tower."""
    out: Path
    """Folder to write."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    images: tuple[Path, ...] = ()
    """For the certificate: image files or folders; default: a package's photos."""
    aotinductor: bool = False
    """With torch: also packages compiled for this kind of machine; takes a C++ compiler and minutes."""


def run(arguments: list[str]) -> int:
    given = parse(Export, arguments, "export")
    from importlib import import_module

    from ov3fast.inference import load_model
    from ov3fast.io import check_writable_folder

    options: dict[str, Any] = {"images": given.images or None} if given.format in CERTIFIED else {}
    if given.images and not options:
        raise ValueError(f"export: --images is for {', '.join(CERTIFIED)}; {given.format} has no certificate")
    if given.aotinductor:
        if given.format != "torch":
            raise ValueError(f"export: --aotinductor is for torch, got {given.format}")
        options["aotinductor"] = True
    check_writable_folder(given.out, "--out")
    door = import_module(f"ov3fast.interop.{given.format}")
    model = load_model(given.model, vae=given.vae, image_size=given.image_size)
    door.export(model, given.out, **options)
    print(f"{given.model} -> {given.out}")
    return 0
