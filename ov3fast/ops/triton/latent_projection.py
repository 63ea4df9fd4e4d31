"""Registers latent_projection's Triton kernels."""

from .. import _dispatch
from . import launch, missing, refuses

_dispatch.register(
    "latent_projection",
    "triton",
    launch("latent_projection", "forward"),
    launch("latent_projection", "backward"),
    missing=missing,
    refuses=lambda tokens, weight, bias, *_: refuses(tokens, weight, bias),
    refuses_backward=lambda grad_x, tokens, weight, *_: refuses(grad_x, tokens, weight),
)
