"""ov3fast fid."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ov3fast.cli.options import parse


@dataclass(kw_only=True)
class Fid:
    """Compute FID and related metrics of images against a reference, under a named protocol; with --save-reference, write such a reference.

    Protocols: adm, rfid, llamagen, torch-fidelity, pytorch-fid (FID's Inception, from --weights), squeezenet (FID-style, needs no weights).
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Image files or folders."""
    reference: Path | None = None
    """.npz written by --save-reference, the ADM evaluator's .npz for protocols that support it, or a folder of images."""
    save_reference: Path | None = None
    """Write the images' moments and features to this file, as a reference for the protocol."""
    protocol: str = "squeezenet"
    weights: Path | None = None
    """FID's Inception: pt_inception-2015-12-05 as .pth or .safetensors."""
    image_size: int = 256
    """Images are first resized and centre-cropped to this many pixels."""
    batch_size: int = 32
    json: bool = False
    """Print a JSON object instead of a table."""


def run(arguments: list[str]) -> int:
    given = parse(Fid, arguments, "fid")
    if (given.reference is None) == (given.save_reference is None):
        raise ValueError("fid: give either --reference or --save-reference")
    from ov3fast.data.assets import fetch
    from ov3fast.generation import fid

    protocol = fid.protocol_named(given.protocol)
    known = None
    if given.reference is not None and not given.reference.is_dir():
        known = fid.Reference.load(given.reference, given.protocol)
    extractor = fid.build_extractor(protocol, given.weights, fetch)
    options = {"image_size": given.image_size, "batch_size": given.batch_size, "progress": True}
    found = fid.extract(given.images, protocol, extractor, **options)
    if given.save_reference is not None:
        fid.Reference(given.protocol, found.moments, found.features).save(given.save_reference)
        print(f"{found.moments.count} images ({found.skipped} skipped) -> {given.save_reference}, protocol {given.protocol}")
        return 0
    if known is None:
        other = fid.extract((given.reference,), protocol, extractor, **options)
        known = fid.Reference(given.protocol, other.moments, other.features)
    figures = fid.figures(found, known)
    if given.json:
        print(json.dumps(figures))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", title=f"{given.protocol}: {protocol.about}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    return 0
