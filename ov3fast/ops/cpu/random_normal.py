"""Lays out random_normal's arguments for csrc/cpu/random_normal.cpp."""

import torch

from .. import _dispatch
from . import missing, refuses, run


def _forward(shape, rng, dtype):
    out = torch.empty(shape, dtype=dtype)
    run("random_normal", dtype, rng.contiguous(), out, out.numel())
    return out


def _refuses(shape, rng, dtype):
    return refuses(rng) or (None if dtype in (torch.float32, torch.bfloat16) else f"it does not take {dtype}")


_dispatch.register("random_normal", "cpu", _forward, missing=missing, refuses=_refuses)
