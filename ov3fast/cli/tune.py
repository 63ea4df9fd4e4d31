"""ov3fast tune."""

from __future__ import annotations

from dataclasses import dataclass

from ov3fast.cli.bench import from_checkout
from ov3fast.cli.options import parse


@dataclass
class TuneOptions:
    """Measures other block sizes, warps and stages of the Triton kernels on this GPU, and keeps what beats the static table."""

    only: str = ""
    """Cases whose operator contains this."""
    dtype: str = ""
    """fp32 or bf16 alone."""
    budget: float = 0.3
    """Seconds of timing per candidate."""


def run(arguments: list[str]) -> int:
    options = parse(TuneOptions, arguments, "tune")
    from_checkout("benches.tune").main(options)
    return 0
