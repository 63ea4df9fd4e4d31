"""ov3fast encode."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ov3fast.cli.options import ImagesOptions, parse

if TYPE_CHECKING:
    from ov3fast.inference.bulk import Done


@dataclass(kw_only=True)
class Encode(ImagesOptions):
    """Encode images into pooled vectors and tokens. IMAGES: files, folders, patterns ("photos/**/*.jpg"), tar shards (files, folders, patterns), or - to read
    paths from standard input, one per line. MODEL may also be the folder of a released vision tower (open_clip_config.json)."""

    out: Path
    """File to write: .safetensors, .npz or .parquet (pooled and tokens), or .npy (pooled only); without an ending, a folder of parts."""
    tokens: bool = True
    """Write the tokens as well as the pooled vectors."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Dtype of the model; auto: the checkpoint's own."""
    store: Literal["float32", "float16"] = "float32"
    """Dtype of the output."""
    processes: int = 1
    """Number of processes, each with its own model and share of the threads."""
    rows: int | None = None
    """Images per part; default: 512, without tokens 4096. To resume an interrupted larger job, run the same command again."""
    parts: Literal["safetensors", "parquet", "npz", "npy"] = "safetensors"
    """Format of the parts in a folder."""
    json: bool = False
    """Print the summary as one JSON object."""


def run(arguments: list[str]) -> int:
    given = parse(Encode, arguments, "encode")
    from ov3fast.inference import bulk, encode_to_file, load_model
    from ov3fast.inference.embeddings import check_output
    from ov3fast.inference.sources import ImageFiles, find
    from ov3fast.terminal import is_terminal

    folder = given.out.is_dir() or not given.out.suffix
    if not folder:
        check_output(given.out, "--out", "have no ending, for a folder of parts")
    lines = [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines()] if Path("-") in given.images else []
    began = time.monotonic()
    one = {"vae": given.vae, "device": given.device, "dtype": given.dtype}
    model = load_model(given.model, **one) if given.processes == 1 else None
    sources = find(given.images, lines)
    shared = {"image_size": given.image_size, "batch_size": given.batch_size, "workers": given.workers}
    small = given.rows is None and len(sources) <= bulk.ROWS_WITH_TOKENS and isinstance(sources, ImageFiles)
    if model is not None and small and not folder and given.store == "float32":
        tokens = {} if given.tokens else {"tokens": False}
        written = encode_to_file(model, sources.items(0, len(sources)), given.out, progress=not given.json, **shared, **tokens)
        done = bulk.Done(written.path, len(written.names), written.skipped, 0, time.monotonic() - began)
    else:
        with bulk.shown(is_terminal() and not given.json) as progress:
            done = bulk.encode_many(
                given.model, sources, given.out, loaded=model, tokens=given.tokens, store=given.store, processes=given.processes,
                rows=given.rows, parts=f".{given.parts}", progress=progress, **one, **shared,
            )  # fmt: skip
    _print(done, given.json)
    return 0


def _print(done: Done, as_json: bool) -> None:
    from ov3fast.data.skips import printable

    if as_json:
        rate = (done.images - done.resumed) / max(done.seconds, 1e-9)
        words = {"out": str(done.path), "images": done.images, "skipped": done.skipped, "resumed": done.resumed}
        print(json.dumps({**words, "seconds": round(done.seconds, 3), "images_per_second": round(max(rate, 0.0), 2)}))
        return
    for name, reason in done.skipped.items():
        print(f"skipped {printable(name)}: {reason}")
    former = f" ({done.resumed} of them by an earlier run)" if done.resumed else ""
    print(f"{done.images} images{former} -> {done.path}")
