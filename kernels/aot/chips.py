"""The chips that kernels are compiled for: their limits, and the peak rates behind the estimates.

Rates are the vendors' peaks for dense operands: NVIDIA A100 datasheet (80 GB SXM, 2021), NVIDIA H100 datasheet (SXM5, 2023), NVIDIA HGX B200
datasheet (per GPU, sparse figures halved, 2024), AMD Instinct MI300X datasheet (2023). No kernel reaches them; an estimate is a lower bound of
the time.
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
    fp32: float
    """FLOP/s of float32 arithmetic outside tensor cores."""
    memory: float
    """Bytes/s of the HBM."""

    def seconds(self, flops: float, bytes: float, dtype: str, matrix: bool) -> tuple[float, str]:
        """(time at the peaks, which of them bounds it)."""
        rate = (self.tensor_fp32 if dtype == "fp32" else self.tensor_16bit) if matrix else self.fp32
        compute, memory = flops / rate, bytes / self.memory
        return (compute, "compute") if compute > memory else (memory, "memory")


CHIPS = {
    "sm_80": Chip("A100 SXM 80 GB", "cuda", 80, 32, 163 * 1024, 312e12, 156e12 / 3, 19.5e12, 2.039e12),
    "sm_90": Chip("H100 SXM", "cuda", 90, 32, 227 * 1024, 989.4e12, 494.7e12 / 3, 66.9e12, 3.35e12),
    "sm_100": Chip("B200", "cuda", 100, 32, 227 * 1024, 2250e12, 1125e12 / 3, 75e12, 8.0e12),
    "gfx942": Chip("MI300X", "hip", "gfx942", 64, 64 * 1024, 1307.4e12, 163.4e12, 163.4e12, 5.3e12),
}
