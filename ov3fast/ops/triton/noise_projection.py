"""Registers noise_projection's Triton kernels."""

from .. import _dispatch
from ..noise_projection import _backward_reference, _forward_reference
from . import launch, missing, refuses, unless_empty

_dispatch.register(
    "noise_projection",
    "triton",
    unless_empty(launch("noise_projection", "forward"), _forward_reference),
    unless_empty(launch("noise_projection", "backward"), _backward_reference),
    missing=missing,
    refuses=lambda z, sigma, weight, bias, rng: refuses(z, sigma, weight, bias, rng),
    refuses_backward=lambda grad_y, z, sigma, weight, rng, *_: refuses(grad_y, z, sigma, weight, rng),
)
