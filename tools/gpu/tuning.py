"""Measures alternative configurations: python -m tools.gpu.tuning ROWS OPERATOR.

For each configuration that a bfloat16 case of the operator picks, its neighbours are tried: one stage more or less, other warps, the other block sizes in the
table for its size class. The time is that of the full call by graph replay, so that host time hides no difference. Each result is a row;
`python -m tools.gpu.results` writes the winners to kernels/measured.csv.
"""

from __future__ import annotations

import argparse
import statistics
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benches import cases, timing, tune
from ov3fast import ops
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib.config import Config, Key

from .rows import Rows
from .setting import DEVICE, REHEARSAL, capture, doing

MOST = 2 if REHEARSAL else 12
"""Most neighbours to try per configuration."""


def neighbours(key: Key, row: Config) -> list[Config]:
    """Candidates to replace `row`, the most promising first."""
    kernel, _, size = key
    found = [replace(row, stages=row.stages + step) for step in (1, -1) if 1 <= row.stages + step <= 5]
    found.append(replace(row, warps=8 if row.warps == 4 else 4))
    found += [replace(row, blocks=dict(blocks)) for blocks in tune.blocks_for(kernel, size)]
    found += tune.described(key)
    return [config for i, config in enumerate(found) if config != row and config not in found[:i]][:MOST]


def trials(call: Callable[[], object]) -> Iterator[tuple[Key, Config, Config]]:
    """(key, its configuration, a neighbour) for all kernels of a call."""
    with configs.trying({}) as picked:
        call()
    for key in sorted(picked):
        row = configs.pick(*key)
        yield from ((key, row, other) for other in neighbours(key, row))


def milliseconds(call: Callable[[], object]) -> float:
    run = call if REHEARSAL else capture(call)[0].replay
    return 1e3 * statistics.median(timing.interleaved({"": run}, budget=0.1, least=2 if REHEARSAL else 10)[""])


def measure(case: cases.Case, rows: Rows) -> None:
    call = case.variants[cases.OURS]
    expected, before = call(), milliseconds(call)
    for key, row, other in trials(call):
        kernel, dtype, size = key
        doing(operator=case.operator, kernel=kernel, config=str(other))
        what = {
            "kernel": kernel, "kind": dtype, "size_class": size, "architecture": configs.current_architecture(), "before": asdict(row),
            "config": asdict(other), "before_ms": before,
        }  # fmt: skip
        status, more = "ok", {}
        try:
            with configs.trying({key: other}):
                tune.assert_agrees(call, expected)
                more = {"ms": milliseconds(call)}
        except Exception as reason:  # too large for the chip, or not a valid tile for this kernel
            status, more = "left out", {"detail": traceback.format_exc(limit=-2)}
            if isinstance(reason, torch.AcceleratorError):
                rows.write(
                    case.operator, "tune", "failed", dtype=case.dtype, size=case.shape, direction=case.direction, **what, **more
                )
                raise
        rows.write(case.operator, "tune", status, dtype=case.dtype, size=case.shape, direction=case.direction, **what, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("operator")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(DEVICE), ops.use("triton"):
        makers = cases.tiny() if REHEARSAL else cases.full(on_gpu=True)
        for case in cases.table(dtype="bf16", makers=[maker for maker in makers if maker[0] == options.operator]):
            measure(case, Rows(options.rows))


if __name__ == "__main__":
    main()
