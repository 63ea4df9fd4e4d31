"""Shared by all kernels: products and rounding that are also correct in the interpreter, dtype names, integer helpers."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from . import fences

# Before the first compilation.
fences.install()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter's bfloat16 products are wrong, so it widens operands first. Compiled code has no such branch.
UPCAST: tl.constexpr = tl.constexpr(INTERPRETED)

# Full-precision float32 products: three TF32 products on NVIDIA, native ones on AMD. aot/compile.py sets it for its target.
FP32_PRODUCTS: tl.constexpr = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Triton's names for the dtypes."""


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in float32; float32 operands in full precision."""
    if UPCAST:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=FP32_PRODUCTS)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x rounded to nearest even in `dtype`. In the interpreter, .to and tl.store would truncate to bfloat16."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def sum_over_rows(x):
    """tl.sum(x, 0). The interpreter adds rows in one long chain, which is less accurate than a tree, so it sums in two steps there."""
    if UPCAST and x.shape[0] >= 64:
        return tl.sum(tl.sum(x.reshape((x.shape[0] // 32, 32, x.shape[1])), 1), 0)
    return tl.sum(x, 0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
