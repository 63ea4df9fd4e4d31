"""Registers random_normal's Triton kernel."""

from .. import _dispatch
from . import DTYPES, launch, missing, refuses


def _refuses(shape, rng, dtype):
    return refuses(rng) or (None if dtype in DTYPES else f"it does not take {dtype}")


_dispatch.register("random_normal", "triton", launch("random_normal", "forward"), missing=missing, refuses=_refuses)
