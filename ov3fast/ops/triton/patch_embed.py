"""Registers patch_embed's Triton kernels."""

from .. import _dispatch
from . import launch, missing, refuses

_dispatch.register(
    "patch_embed",
    "triton",
    launch("patch_embed", "forward"),
    launch("patch_embed", "backward"),
    missing=missing,
    refuses=lambda latents, weight, bias, pos_embed, cls_token, rng, *_: refuses(
        latents, weight, bias, pos_embed, cls_token, rng
    ),
    refuses_backward=lambda grad_y, latents, weight, rng, *_: refuses(grad_y, latents, weight, rng),
)
