"""layer_norm on kernels/layer_norm.py."""

from .. import _dispatch
from . import launch, missing, refuses

WIDEST = 8192


def _refuses(x, weight):
    if x.shape[-1] > WIDEST:
        return f"its rows lie in registers, up to {WIDEST} wide; these are {x.shape[-1]} wide"
    return refuses(x, weight)


_dispatch.register(
    "layer_norm", "triton", launch("layer_norm", "forward"), launch("layer_norm", "backward"), missing=missing,
    refuses=lambda x, weight, *_: _refuses(x, weight),
    refuses_backward=lambda grad_y, grad_h, h, weight, *_: _refuses(h, weight),
)  # fmt: skip
