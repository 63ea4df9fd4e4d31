"""Lays out random_normal's arguments for csrc/cpu/random_normal.cpp."""

import torch

from .. import _dispatch
from . import Kernel, unavailable_reason, unsupported_reason

NORMAL = Kernel(
    "random_normal",
    "int64_t* rng, T* out, int64_t n",
)
WORDS = Kernel(
    "random_words",
    "int64_t* rng, uint32_t* out, int64_t n",
    dtypes=(torch.float32,),
)


def _forward(shape, rng, dtype):
    out = torch.empty(shape, dtype=dtype)
    NORMAL(dtype, rng.contiguous(), out, out.numel())
    return out


_dispatch.register(
    "random_normal", "cpu", _forward, operands=("rng", "dtype"),
    unavailable_reason=unavailable_reason, unsupported_reason=unsupported_reason,
)  # fmt: skip
