"""What layer_norm and rms_norm share: rows of configuration, and loading a row with the residual added. A program holds entire rows."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .common import rounded
from .config import ANY, ARCHITECTURES, TABLE, Config
from .rows import load_rows

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
"""Size classes: the smallest of these that fits a row."""


@functools.cache
def size_class(width: int) -> str:
    return str(next(block for block in WIDTHS if block >= width))


def add_configurations(op: str) -> None:
    """Rows of `op`'s two kernels. The backward holds 16 elements per thread, of which five copies live in registers."""
    for kernel, elements, columns_of_warp in (("forward", 4096, 1024), ("backward", 2048, 512)):
        TABLE[f"{op}_{kernel}"] = {
            (ANY, str(d), ANY): Config(
                {"BLOCK_ROWS": max(1, elements // d), "BLOCK_D": d}, warps=max(4, d // columns_of_warp), stages=1
            )
            for d in WIDTHS
        }
    # Of float32 a thread of 16 warps would hold 16 elements, and ptxas would spill; an AMD GPU's 16 warps have 1024 threads already.
    TABLE[f"{op}_backward"] |= {
        ("fp32", "8192", arch): Config({"BLOCK_ROWS": 1, "BLOCK_D": 8192}, warps=32, stages=1)
        for arch in ARCHITECTURES
        if arch.startswith("sm_")
    }


@triton.jit
def load_sum(
    x, x_inner, x_outer_stride, x_inner_stride, residual, residual_inner, residual_outer_stride, residual_inner_stride,
    h, out, row, column, mask,
):  # fmt: skip
    """x + residual in float32, as rounded to the storage dtype and stored at h + out; x without a residual."""
    value = load_rows(x, x_inner, x_outer_stride, x_inner_stride, row, column, mask)
    if residual is not None:
        value += load_rows(residual, residual_inner, residual_outer_stride, residual_inner_stride, row, column, mask)
        kept = rounded(value, h.dtype.element_ty)
        tl.store(h + out, kept, mask=mask)
        value = kept.to(tl.float32)
    return value
