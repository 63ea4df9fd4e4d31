"""ov3fast export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ov3fast.cli.options import parse

CERTIFIED = ("torch", "onnx", "openvino")
"""Formats whose outputs are compared with the model's on images."""


@dataclass
class Export:
    """Export a model for other libraries and runtimes.

    transformers: a folder for AutoModel, with its code. llava: a run of `ov3fast train --recipe understand-...`, for
    LlavaForConditionalGeneration. open_clip: the vision tower in the released layout. torch, onnx, openvino: the parts (image,
    reconstruct, text) as files that run without ov3fast, with a certificate of their numerical error.
    """

    format: Annotated[
        Literal["transformers", "llava", "open_clip", "torch", "onnx", "openvino"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FORMAT"),
    ]
    """transformers, llava, open_clip, torch, onnx or openvino."""
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, training run, hub id, or the folder of a released vision tower."""
    out: Path
    """Folder to write."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    vae: str | None = None
    """VAE to use instead of the model's: a folder, a hub id, or "small"."""
    images: tuple[Path, ...] = ()
    """Image files or folders for the certificate; default: photos from scikit-image."""
    aotinductor: bool = False
    """With torch: also write packages compiled for this kind of machine; needs a C++ compiler and takes minutes."""


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
    if given.format == "llava":
        if given.image_size or given.vae:
            raise ValueError("export: --image-size and --vae are not for llava, whose run has both")
        import_module("ov3fast.interop.llava_transformers").export(given.model, given.out)
        print(f"{given.model} -> {given.out}")
        return 0
    door = import_module(f"ov3fast.interop.{given.format}")
    model = load_model(given.model, vae=given.vae, image_size=given.image_size)
    door.export(model, given.out, **options)
    print(f"{given.model} -> {given.out}")
    return 0
