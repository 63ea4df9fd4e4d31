"""Tunes block sizes, warps and stages of the Triton kernels on this GPU, and keeps what beats the static table.

    ov3fast tune                      # all operators
    ov3fast tune --only attention     # some; earlier results for the others are kept

For every row that a case of the operator table picks, it tries the block sizes that the table has for its size class (on any chip, for any dtype) with 4 and
8 warps and 1 to 4 stages, and, unchanged, this chip's rows for variants of that size class ("64 tma"). The result is stored in $OV3FAST_CACHE or
~/.cache/ov3fast, keyed by device, driver and the kernels' source: after a change of any of them, the static table applies again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from ov3fast import ops
from ov3fast.kernels.lib import config as configs
from ov3fast.kernels.lib.config import Config, Key

from . import cases, timing

if TYPE_CHECKING:
    from ov3fast.cli.tune import TuneOptions

GAIN = 0.97
"""A candidate must take less than this fraction of the previous row's time."""


def candidates(key: Key) -> Iterator[Config]:
    """Candidates for this kernel, dtype and size class."""
    kernel, _, size = key
    for block in blocks_for(kernel, size):
        for warps in (4, 8):
            for stages in (1, 2, 3, 4):
                yield Config(dict(block), warps, stages)
    yield from described(key)


def blocks_for(kernel: str, size: str) -> list[tuple[tuple[str, int], ...]]:
    """The block sizes in the table for a size class, on any chip, for any dtype."""
    rows = configs.TABLE[kernel].items()
    return sorted({tuple(sorted(row.blocks.items())) for (_, s, _), row in rows if s in (size, configs.ANY)})


def described(key: Key) -> list[Config]:
    """This chip's rows for variants of the size class ("64 tma"), which are not picked by default."""
    kernel, dtype, size = key
    here = dtype, configs.current_architecture()
    return [row for (d, s, a), row in configs.TABLE[kernel].items() if (d, a) == here and s.startswith(f"{size} ")]


def assert_agrees(run: Callable[[], Any], expected: Any) -> None:
    """Compares up to rounding, since other block sizes sum in another order.

    Before, memory like that of the results is filled with NaN and freed: the allocator gives it out again, and a kernel that was compiled to nothing, as Triton
    does with some tiles, must not pass by what an earlier candidate wrote there.
    """
    spoiled = [torch.full_like(tensor, torch.nan) for tensor in tree_leaves(expected) if tensor.is_floating_point()]
    del spoiled
    torch.testing.assert_close(run(), expected, rtol=2e-2, atol=2e-2)


def improve(
    run: Callable[[], Any], found: dict[Key, Config], seconds: Callable[[Callable[[], Any]], float]
) -> Iterator[tuple[Key, Config, float]]:
    """Adds better rows for the kernels that `run` launches to `found`; yields each with its time relative to the previous row."""
    with configs.trying(found) as picked:
        expected = run()
        best = seconds(run)
    for key in sorted(picked - found.keys()):
        before = best
        for config in candidates(key):
            with configs.trying({**found, key: config}):
                try:
                    assert_agrees(run, expected)
                    now = seconds(run)
                except Exception:  # too large for the chip, or not a valid tile for this kernel
                    continue
            if now < GAIN * best:
                found[key], best = config, now
        if key in found:
            yield key, found[key], best / before


def main(options: TuneOptions) -> None:
    from ov3fast.ops import triton

    reason = triton.unavailable_reason()
    if reason is not None or not torch.cuda.is_available():
        raise RuntimeError(f"nothing to tune: {reason or 'there is no GPU'}")
    path = configs.tuned_path()
    found: dict[Key, Config] = {}
    kept = configs.load(path) if path.exists() else {}

    def seconds(run: Callable[[], Any]) -> float:
        return statistics.median(timing.interleaved({"": run}, options.budget)[""])

    with torch.device("cuda"), ops.use("triton"):
        for case in cases.table(options.only, options.dtype):
            for key, config, share in improve(case.variants[cases.OURS], found, seconds):
                print(f"{case.operator} {case.shape}: {' '.join(key)}: {config}, {share:.2f} of the time")
                configs.save({**kept, **found}, path)
    print(f"{len(found)} rows beat the table; written: {path}" if found else "no row beats the table")
