"""ov3fast replay RUN STEP: recompute a training step's losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ov3fast.cli.options import parse

CLOCK = ("seconds", "images_per_s", "data_wait", "memory_gib", "tflops", "mfu")


@dataclass
class Replay:
    """Recompute the losses of a training step from the newest checkpoint before it and compare them with the log. Writes nothing."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    step: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """The step, counted from 1 as in log.jsonl."""
    device: str | None = None
    """cpu, cuda or cuda:N; default: the GPU if there is one."""


def run(arguments: list[str]) -> int:
    given = parse(Replay, arguments, "replay")
    from ov3fast.training.replay import replay

    if not (given.run / "recipe.json").is_file():
        raise FileNotFoundError(f"{given.run} is not a run (it has no recipe.json); give a run's folder")
    row, logged, begun = replay(given.run, given.step, given.device)
    print(f"step {given.step}, from {f'the checkpoint of step {begun}' if begun else 'the beginning'}")
    for name, value in row.items():
        if name in CLOCK or not isinstance(value, float):
            continue
        then = None if logged is None else logged.get(name)
        note = "" if then is None else f"  log {then:.9g}  {'the same' if then == value else f'differs by {value - then:.3g}'}"
        print(f"{name:<14} {value:.9g}{note}")
    return 0
