"""linear on kernels/linear.py."""

from .. import _dispatch
from . import launch, missing, refuses

_dispatch.register(
    "linear", "triton", launch("linear", "forward"), launch("linear", "backward"), missing=missing,
    refuses=lambda x, weight, *_: refuses(x, weight),
    refuses_backward=lambda grad_y, x, weight, *_: refuses(x, weight),
)  # fmt: skip
