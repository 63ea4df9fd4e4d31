"""The figures of pretraining, benches/results/pretrain-CHIP.csv: the step, the latent cache, the exchange, the data and the checkpoints.

    python -m benches.pretrain                       # every part, some ten minutes on a quiet machine
    python -m benches.pretrain decode start          # these; the rows of the others stay

A part runs in a process of its own. Variants take turns in it and medians are kept.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro

from . import data, figures, training
from .figures import Figure

PARTS: dict[str, Callable[..., list[Figure]]] = {
    "step-128-bf16": partial(training.step, 128, 16, "bf16"),
    "step-128-fp32": partial(training.step, 128, 16, "fp32"),
    "step-256": partial(training.step, 256, 2, "bf16"),
    "cached": training.cached,
    "written": training.written,
    "exchange": data.exchange,
    "decode": data.decode,
    "resume": data.resume,
    "start": data.start,
    "checkpoint": training.checkpoint,
}


@dataclass
class Options:
    parts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Default: all."""
    threads: int = 2
    budget: float = 20.0
    """Seconds for the runs of one comparison."""
    variants: tuple[str, ...] = ()
    """Of the step parts: ov3fast, eager, compile; default: all."""
    save: bool = True


def main(options: Options) -> None:
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise SystemExit(f"parts: must be of {', '.join(PARTS)}; got {unknown[0]}")
    if len(options.parts) == 1:
        torch.set_num_threads(options.threads)
        part = options.parts[0]
        rows = PARTS[part](options)
        for row in rows:
            print("  ".join(filter(None, row.columns().values())), flush=True)
        if options.save:
            figures.keep(part, rows, list(PARTS))
        return
    for part in options.parts or PARTS:
        flags = ["--threads", str(options.threads), "--budget", str(options.budget), "--save" if options.save else "--no-save"]
        subprocess.run([sys.executable, "-m", "benches.pretrain", part, *flags], check=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
