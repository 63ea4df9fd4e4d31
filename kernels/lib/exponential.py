"""Exponentials without subnormal results: on NVIDIA tl.exp2 takes three instructions more a number for those."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .common import UPCAST


@triton.jit
def exp2(x):
    """2^x; 0 below 2^-126 on NVIDIA."""
    if UPCAST:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def exp(x):
    return exp2(x * 1.4426950408889634)
