"""Registers kernels/contrastive/launch.py; the ranks are the operator's own."""

from .. import _dispatch
from ..contrastive_loss import over_ranks
from . import launch, missing, refuses

_dispatch.register(
    "contrastive_loss", "triton",
    *over_ranks(*(launch("contrastive.launch", name) for name in ("forward_rows", "backward_rows", "project"))),
    missing=missing,
    refuses=lambda image, text, *_: refuses(image, text),
    refuses_backward=lambda grad_loss, image, text, *_: refuses(image, text),
)  # fmt: skip
