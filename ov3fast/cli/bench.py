"""ov3fast bench, ov3fast tune: the options, so that --help works in an installed package; the code is in benches/ of a checkout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ov3fast.cli.options import parse


@dataclass
class BenchOptions:
    """Benchmark every operator on this machine against PyTorch's best alternative."""

    only: str = ""
    """Only rows whose operator contains this; the table is then printed rather than written, unless out or update is given."""
    dtype: str = ""
    """Only fp32 or bf16."""
    shape: str = ""
    """Only rows whose size contains this, such as "[144,"."""
    device: Literal["cpu", "cuda"] = "cpu"
    compile: bool = True
    """Also measure torch.compile, which needs a C++ compiler and takes a few minutes."""
    budget: float = 4.0
    """Seconds of timing per row (more if five rounds take longer)."""
    update: bool = False
    """Update the measured rows in this chip's file and keep the others."""
    out: Path | None = None
    markdown: Path | None = None
    """Print this results file as Markdown without measuring anything."""


def run(arguments: list[str]) -> int:
    options = parse(BenchOptions, arguments, "bench")
    from_checkout("benches.operators").main(options)
    return 0


def from_checkout(module: str) -> Any:
    """Imports a module from the repository's benches/, which is not installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benches" / "operators.py").exists():
        raise RuntimeError(f"{module} is not installed: run this in a checkout of the repository (pip install --editable .)")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    return import_module(module)
