"""The chips that kernels are compiled for: their limits, and the peak rates behind the estimates.

Rates are the vendors' peaks for dense operands: NVIDIA A100 datasheet (80 GB SXM, 2021), NVIDIA H100 datasheet (SXM5, 2023), NVIDIA HGX B200
datasheet (per GPU, sparse rates halved, 2024), AMD Instinct MI300X datasheet (2023); clocks are those implied by the peaks. Cache sizes and
the resources of an SM (compute unit): the vendors' tuning guides and the compute-capability table of the CUDA programming guide.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str
    backend: str
    """"cuda" or "hip"."""
    arch: int | str
    """The value for Triton's GPUTarget."""
    warp: int
    shared: int
    """Largest shared memory of a program, in bytes."""
    tensor_16bit: float
    """FLOP/s of bfloat16 and float16 products."""
    tensor_fp32: float
    """FLOP/s of full-precision float32 products: on NVIDIA a third of the TF32 rate, since `dot` splits each product in three."""
    memory: float
    """HBM bandwidth in bytes/s."""
    l2: int
    """Size of the last-level cache in bytes."""
    sms: int
    clock: float
    sm_shared: int
    """Shared memory of an SM, for all its programs, in bytes."""
    max_warps: int = 64
    max_programs: int = 32
    issue_cycles: int = 1
    """Cycles that a warp instruction occupies one of an SM's four schedulers."""
    mufu_cycles: int = 8
    """The same for a special function."""


MB = 1024 * 1024
CHIPS = {
    "sm_80": Chip(
        "A100 SXM 80 GB", "cuda", 80, 32, 163 * 1024, 312e12, 156e12 / 3, 2.039e12, 40 * MB, 108, 1.41e9, 164 * 1024
    ),
    "sm_90": Chip(
        "H100 SXM", "cuda", 90, 32, 227 * 1024, 989.4e12, 494.7e12 / 3, 3.35e12, 50 * MB, 132, 1.83e9, 228 * 1024
    ),
    "sm_100": Chip("B200", "cuda", 100, 32, 227 * 1024, 2250e12, 1125e12 / 3, 8.0e12, 126 * MB, 148, 1.856e9, 228 * 1024),
    # A wavefront of 64 executes on 16 lanes, special functions on 4; at most 8 wavefronts are resident per SIMD.
    "gfx942": Chip(
        "MI300X", "hip", "gfx942", 64, 64 * 1024, 1307.4e12, 163.4e12, 5.3e12, 256 * MB, 304, 2.1e9, 64 * 1024,
        max_warps=32, issue_cycles=4, mufu_cycles=16,
    ),
}  # fmt: skip
