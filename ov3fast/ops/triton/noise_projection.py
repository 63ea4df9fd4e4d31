"""Registers noise_projection's Triton kernels."""

from .. import _dispatch
from . import launch, missing, refuses

_dispatch.register(
    "noise_projection",
    "triton",
    launch("noise_projection", "forward"),
    launch("noise_projection", "backward"),
    missing=missing,
    refuses=lambda z, sigma, weight, bias, rng: refuses(z, sigma, weight, bias, rng),
    refuses_backward=lambda grad_y, z, sigma, weight, rng, *_: refuses(grad_y, z, sigma, weight, rng),
)
