"""Registers group_norm_silu's Triton kernels."""

from .. import _dispatch
from . import launch, missing, refuses

_dispatch.register(
    "group_norm_silu",
    "triton",
    launch("group_norm_silu", "forward"),
    launch("group_norm_silu", "backward"),
    missing=missing,
    refuses=lambda x, groups, weight, bias, eps: refuses(x, weight, bias),
    refuses_backward=lambda grad_y, x, weight, bias, mean, rstd, *_: refuses(grad_y, x, weight, bias, mean, rstd),
)
