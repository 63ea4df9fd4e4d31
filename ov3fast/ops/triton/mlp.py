"""mlp on kernels/mlp.py."""

from .. import _dispatch
from . import launch, missing, refuses

_dispatch.register(
    "mlp", "triton", launch("mlp", "forward"), launch("mlp", "backward"), missing=missing,
    refuses=lambda x, w1, *_: refuses(x, w1),
    refuses_backward=lambda grad_y, x, h, w1, *_: refuses(x, w1),
)  # fmt: skip
