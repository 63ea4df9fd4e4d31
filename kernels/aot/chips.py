"""The chips that kernels are compiled for: their limits, and the peak rates behind the estimates.

Rates are the vendors' peaks for dense operands: NVIDIA A100 datasheet (80 GB SXM, 2021), NVIDIA H100 datasheet (SXM5, 2023), NVIDIA HGX B200
datasheet (per GPU, sparse figures halved, 2024), AMD Instinct MI300X datasheet (2023); clocks are those that the peaks imply. Sizes of caches
and what an SM (a compute unit) holds: the vendors' tuning guides and the CUDA programming guide's table of compute capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str
    backend: str
    """"cuda" or "hip"."""
    arch: int | str
    """As Triton's GPUTarget takes it."""
    warp: int
    shared: int
    """Bytes of shared memory that one program may have."""
    tensor_16bit: float
    """FLOP/s of products of bfloat16 or float16."""
    tensor_fp32: float
    """FLOP/s of float32 products in full precision: on NVIDIA a third of the TF32 rate, since `dot` splits them in three."""
    memory: float
    """Bytes/s of the HBM."""
    l2: int
    """Bytes of the last cache before the HBM."""
    sms: int
    clock: float
    sm_shared: int
    """Bytes of shared memory of an SM, for all its programs."""
    max_warps: int = 64
    max_programs: int = 32
    issue_cycles: int = 1
    """Cycles for which an instruction of a warp occupies one of an SM's four schedulers."""
    mufu_cycles: int = 8
    """The same of a special function."""


MB = 1024 * 1024
CHIPS = {
    "sm_80": Chip(
        "A100 SXM 80 GB", "cuda", 80, 32, 163 * 1024, 312e12, 156e12 / 3, 2.039e12, 40 * MB, 108, 1.41e9, 164 * 1024
    ),
    "sm_90": Chip(
        "H100 SXM", "cuda", 90, 32, 227 * 1024, 989.4e12, 494.7e12 / 3, 3.35e12, 50 * MB, 132, 1.83e9, 228 * 1024
    ),
    "sm_100": Chip("B200", "cuda", 100, 32, 227 * 1024, 2250e12, 1125e12 / 3, 8.0e12, 126 * MB, 148, 1.856e9, 228 * 1024),
    # A wave of 64 passes through 16 lanes, special functions through 4; at most 8 waves are resident per SIMD.
    "gfx942": Chip(
        "MI300X", "hip", "gfx942", 64, 64 * 1024, 1307.4e12, 163.4e12, 5.3e12, 256 * MB, 304, 2.1e9, 64 * 1024,
        max_warps=32, issue_cycles=4, mufu_cycles=16,
    ),
}  # fmt: skip
