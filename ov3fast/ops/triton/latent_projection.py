"""Registers latent_projection's Triton kernels."""

from .. import _dispatch
from ..latent_projection import _backward_reference, _forward_reference
from . import launch, missing, refuses, unless_empty

_dispatch.register(
    "latent_projection",
    "triton",
    unless_empty(launch("latent_projection", "forward"), _forward_reference),
    unless_empty(launch("latent_projection", "backward"), _backward_reference),
    missing=missing,
    refuses=lambda tokens, weight, bias, *_: refuses(tokens, weight, bias),
    refuses_backward=lambda grad_x, tokens, weight, *_: refuses(grad_x, tokens, weight),
)
