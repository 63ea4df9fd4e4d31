"""ov3fast bench, ov3fast tune: their options, which an installed package shows too; the work is benches/ of a checkout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ov3fast.cli.options import parse


@dataclass
class BenchOptions:
    """The operator table: every operator against the best that PyTorch offers for it, on this machine."""

    only: str = ""
    """Rows whose operator contains this; the table is then printed, not written, unless out or update is given."""
    dtype: str = ""
    """fp32 or bf16 alone."""
    device: Literal["cpu", "cuda"] = "cpu"
    compile: bool = True
    """Also try torch.compile, which takes a C++ compiler and some minutes."""
    budget: float = 4.0
    """Seconds of timing per row (more where five turns take longer)."""
    update: bool = False
    """Put the rows measured into this chip's file, and leave its others as they are."""
    out: Path | None = None
    markdown: Path | None = None
    """Print this table of results as Markdown, and measure nothing."""


def run(arguments: list[str]) -> int:
    options = parse(BenchOptions, arguments, "bench")
    from_checkout("benches.operators").main(options)
    return 0


def from_checkout(module: str) -> Any:
    """A module of the repository's benches/, which is not installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benches" / "operators.py").exists():
        raise RuntimeError(f"{module} is not installed: run this in a checkout of the repository (pip install --editable .)")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    return import_module(module)
