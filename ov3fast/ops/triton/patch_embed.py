"""Registers patch_embed's Triton kernels."""

from .. import _dispatch
from ..patch_embed import _backward_reference, _forward_reference
from . import launch, missing, refuses, unless_empty

_dispatch.register(
    "patch_embed",
    "triton",
    unless_empty(launch("patch_embed", "forward"), _forward_reference),
    unless_empty(launch("patch_embed", "backward"), _backward_reference),
    missing=missing,
    refuses=lambda latents, weight, bias, pos_embed, cls_token, rng, *_: refuses(
        latents, weight, bias, pos_embed, cls_token, rng
    ),
    refuses_backward=lambda grad_y, latents, weight, rng, *_: refuses(grad_y, latents, weight, rng),
)
