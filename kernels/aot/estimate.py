"""A lower bound on the time of a launch: the largest of four terms.

tensor   products on tensor cores, at the rate that the best libraries sustain (SUSTAINED_TENSOR of the vendor's peak)
hbm      each tensor once, plus what every wave of programs reads again beyond the L2 cache, at SUSTAINED_HBM of the peak
mufu     special functions, for exp, log, erf and reciprocals: 16 per clock and SM
issue    instructions: one per clock and scheduler, four schedulers per SM

The last two are counted in the machine code, each loop body times its trip count (loops.py). All but hbm are for the SM with the most programs, so a
last wave that fills few SMs counts in full. The terms overlap fully only if several programs share an SM: `occupancy` is how many fit,
and `serial_us` is the time of a single one, whose main loop does not overlap its prologue and epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .catalog import Work
from .chips import Chip
from .loops import inner, trips

SUSTAINED_TENSOR = 0.8
SUSTAINED_HBM = 0.9
TERMS = ("tensor_us", "hbm_us", "mufu_us", "issue_us")


def estimate(
    work: Work, chip: Chip, dtype: str, matrix: bool, warps: int, measured: Mapping[str, Any]
) -> dict[str, float | str | int]:
    """occupancy, the four terms, the largest of them (estimate_us, named in `bound`), and serial_us.

    measured: registers, shared_bytes and loops of the machine code.
    """
    together = occupancy(chip, warps, measured["registers"], measured["shared_bytes"])
    rounds = math.ceil(work.programs / chip.sms)
    rate = SUSTAINED_TENSOR * (chip.tensor_fp32 if dtype == "fp32" else chip.tensor_16bit)
    tensor = work.flops * rounds * chip.sms / work.programs / rate if matrix else 0.0
    waves = math.ceil(work.programs / (chip.sms * max(together, 1)))
    moved = work.once + (waves - 1) * max(0.0, work.streamed - chip.l2)
    hbm = moved / (SUSTAINED_HBM * chip.memory)

    loops = measured.get("loops") or [{"parent": None, "at": 0, "issue": 0, "mufu": 0, "flops": 0, "bytes": 0}]
    share = work.programs * warps
    times = trips(loops, work.trips, work.shares, work.flops / share, work.bytes / share)
    cycles = {True: {"mufu": 0.0, "issue": 0.0}, False: {"mufu": 0.0, "issue": 0.0}}
    for loop, turns, innermost in zip(loops, times, inner(loops), strict=True):
        cycles[innermost]["mufu"] += turns * loop["mufu"] * chip.mufu_cycles
        cycles[innermost]["issue"] += turns * loop["issue"] * chip.issue_cycles
    second = rounds * warps / (4 * chip.clock)
    terms = {
        "tensor_us": tensor,
        "hbm_us": hbm,
        **{f"{what}_us": second * (cycles[True][what] + cycles[False][what]) for what in ("mufu", "issue")},
    }
    bound = max(TERMS, key=lambda term: terms[term])
    serial = max(tensor, *(second * value for value in cycles[True].values())) + second * max(cycles[False].values())
    alone = together < 2 and any(inner(loops))
    return {
        "occupancy": together,
        **{name: round(1e6 * value, 3) for name, value in terms.items()},
        "bound": bound.removesuffix("_us"),
        "estimate_us": round(1e6 * terms[bound], 3),
        "serial_us": round(1e6 * (max(hbm, serial, terms[bound]) if alone else terms[bound]), 3),
    }


def occupancy(chip: Chip, warps: int, registers: int, shared: int) -> int:
    """Programs that fit on an SM at once."""
    fits = min(chip.max_programs, chip.max_warps // warps)
    if registers:
        if chip.backend == "cuda":  # a warp's registers are allocated in units of 256
            fits = min(fits, 65536 // (math.ceil(32 * registers / 256) * 256 * warps))
        else:  # each of four SIMDs has 512 registers per lane, allocated in units of 8
            fits = min(fits, 4 * (512 // (math.ceil(registers / 8) * 8)) // warps)
    if shared:
        reserved = 1024 if chip.backend == "cuda" else 0
        fits = min(fits, chip.sm_shared // (shared + reserved))
    return fits
