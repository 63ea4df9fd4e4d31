"""Registers kernels/linear_cross_entropy.py."""

from .. import _dispatch
from . import launch, missing, refuses

_dispatch.register(
    "linear_cross_entropy", "triton", launch("linear_cross_entropy", "forward"), launch("linear_cross_entropy", "backward"),
    missing=missing,
    refuses=lambda hidden, weight, *_: refuses(hidden, weight),
    refuses_backward=lambda grad_nll, hidden, weight, *_: refuses(hidden, weight),
)  # fmt: skip
_dispatch.register(
    "linear_cross_entropy_total", "triton", launch("linear_cross_entropy", "total"), missing=missing,
    refuses=lambda hidden, weight, *_: refuses(hidden, weight),
)  # fmt: skip
