"""ov3fast search."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ov3fast.cli.options import parse


@dataclass
class Search:
    """Find the images in an embeddings file nearest to a text or an image; prints one line "score<TAB>name" per hit."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """File or folder written by `ov3fast encode`."""
    model: str
    """The model that it was written with: folder, training run or hub id."""
    text: str | None = None
    image: Path | None = None
    top: int = 10
    """Number of hits to print."""
    json: bool = False
    """Print one JSON object {"score": ..., "image": ...} per line."""
    vae: str | None = None
    """VAE to use instead of the model's: a folder, a hub id, or "small"."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: cpu."""


def run(arguments: list[str]) -> int:
    given = parse(Search, arguments, "search")
    if (given.text is None) == (given.image is None):
        raise ValueError("search: give either --text or --image")
    from ov3fast.data.skips import printable
    from ov3fast.inference.embeddings import read_embeddings
    from ov3fast.inference.load import load_model
    from ov3fast.inference.search import search

    index = read_embeddings(given.index)
    model = load_model(given.model, vae=given.vae, device=given.device)
    for hit in search(model, index, text=given.text, image=given.image, top=given.top):
        if given.json:
            print(json.dumps({"score": round(hit.score, 6), "image": hit.name}))
        else:
            print(f"{hit.score:.4f}\t{printable(hit.name)}")
    return 0
