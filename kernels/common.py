"""What all kernels share: rounding and products that are exact in the interpreter as well, and integer helpers of the launchers."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter multiplies bfloat16 wrongly, so there operands are widened first; compiled code never sees that branch.
UPCAST: tl.constexpr = tl.constexpr(INTERPRETED)

# Float32 products in full precision: three TF32 products on NVIDIA; AMD's compiler takes them as they are. aot.py sets it for its target.
FP32_PRODUCTS: tl.constexpr = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Triton's names of the dtypes that the kernels take."""


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 sums; float32 operands are multiplied in full precision."""
    if UPCAST:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=FP32_PRODUCTS)
    else:
        return tl.dot(a, b, acc)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
