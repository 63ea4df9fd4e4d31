"""ov3fast caption."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ov3fast.cli.options import ImagesOptions, parse
from ov3fast.io import atomic_write, check_writable

if TYPE_CHECKING:
    from ov3fast.inference import Captioned


@dataclass(kw_only=True)
class Caption(ImagesOptions):
    """Caption images: one line "name<TAB>caption" or one JSON object per image."""

    out: Path | None = None
    """File to write instead of standard output: .jsonl (one {"image": ..., "caption": ...} per line) or .txt."""
    beams: int = 3
    """Beam search width; 1 is greedy."""


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
        count = captioned = 0
        for count, one in enumerate(found, 1):  # noqa: B007
            captioned += one.caption is not None
            print(_line(one, "txt"), flush=True)
    else:
        count, captioned = _write(found, given.out)
        print(f"{count} images -> {given.out}")
    if not captioned:
        raise ValueError(f"caption: none of the {count} images could be read")
    return 0


def _write(found: Iterable[Captioned], out: Path) -> tuple[int, int]:
    """Writes one line per image and returns the number of images and of captions. If the job ends early, the lines written so far
    are kept in <name>.partial<suffix>."""
    count = captioned = 0
    with atomic_write(out) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        try:
            for count, one in enumerate(found, 1):  # noqa: B007
                captioned += one.caption is not None
                file.write(_line(one, out.suffix[1:]) + "\n")
        except BaseException:
            if count:
                partial = out.with_name(f"{out.stem}.partial{out.suffix}")
                with contextlib.suppress(OSError):  # a full disk may be the reason for the failure
                    file.flush()
                    os.replace(temporary, partial)
                    warnings.warn(f"stopped after {count} images; they are in {partial}", stacklevel=2)
            raise
    return count, captioned


def _line(one: Captioned, suffix: str) -> str:
    if suffix == "jsonl":
        reason = {"skipped": one.reason} if one.caption is None else {}
        return json.dumps({"image": one.name, "caption": one.caption, **reason})
    from ov3fast.data.skips import printable

    caption = one.caption if one.caption is not None else f"(skipped: {one.reason})"
    return printable(one.name).replace("\t", "\\t") + "\t" + printable(caption)
