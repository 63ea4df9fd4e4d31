"""ov3fast caption."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ov3fast.cli.options import parse
from ov3fast.io import atomic_write, check_writable

if TYPE_CHECKING:
    from ov3fast.inference import Captioned


@dataclass
class Caption:
    """Images to captions: a line "name<TAB>caption" each, or a JSON object each."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, training run or hub id."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES...")]
    """Image files or folders."""
    out: Path | None = None
    """File to write in place of standard output: .jsonl ({"image": ..., "caption": ...} a line) or .txt."""
    beams: int = 3
    """Beams of the search; 1 is greedy."""
    image_size: int | None = None
    """Pixels; default: the model's."""
    batch_size: int = 32
    workers: int = 2
    """Threads that decode the images."""
    vae: str | None = None
    """VAE in place of the model's: a folder, a hub id, or "small"."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: cpu."""


def run(arguments: list[str]) -> int:
    given = parse(Caption, arguments, "caption")
    if given.out is not None:
        if given.out.suffix not in (".jsonl", ".txt"):
            raise ValueError(f"caption: --out must end in .jsonl or .txt, got {given.out}")
        check_writable(given.out, "--out")
    from ov3fast.inference import caption, load_model

    model = load_model(given.model, vae=given.vae, device=given.device)
    found = caption(
        model, given.images, beams=given.beams, image_size=given.image_size, batch_size=given.batch_size, workers=given.workers
    )  # fmt: skip
    if given.out is None:
        for one in found:
            print(_line(one, "txt"), flush=True)
        return 0
    count = 0
    with atomic_write(given.out) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        for count, one in enumerate(found, 1):  # noqa: B007
            file.write(_line(one, given.out.suffix[1:]) + "\n")
    print(f"{count} images -> {given.out}")
    return 0


def _line(one: Captioned, suffix: str) -> str:
    if suffix == "jsonl":
        reason = {"skipped": one.reason} if one.caption is None else {}
        return json.dumps({"image": one.name, "caption": one.caption, **reason})
    from ov3fast.data.skips import printable

    caption = one.caption if one.caption is not None else f"(skipped: {one.reason})"
    return printable(one.name).replace("\t", "\\t") + "\t" + printable(caption)
