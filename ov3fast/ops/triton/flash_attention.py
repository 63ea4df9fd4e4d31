"""flash_attention on kernels/attention; the packed operator's gradient is written where it belongs."""

from .. import _attention_peers, _dispatch
from . import launch, missing, refuses

LARGEST_HEAD = 256


def _refuses(q, k, v, *_):
    if q.shape[-1] > LARGEST_HEAD:
        return f"head_dim must be at most {LARGEST_HEAD}, got {q.shape[-1]}"
    return refuses(q, k, v)


_dispatch.register(
    "flash_attention", "triton", launch("attention.launch", "forward"), launch("attention.launch", "backward"),
    missing=missing, refuses=_refuses, refuses_backward=lambda grad_out, q, k, v, *_: _refuses(q, k, v),
    slower_than=_attention_peers.faster_than_triton,
    slower_than_backward=_attention_peers.faster_than_triton,
)  # fmt: skip
_dispatch.register(
    "flash_attention_qkvpacked", "triton", launch("attention.launch", "forward_packed"), launch("attention.launch", "backward_packed"),
    missing=missing, refuses=lambda qkv, *_: _refuses(qkv, qkv, qkv),
    refuses_backward=lambda grad_out, qkv, *_: _refuses(qkv, qkv, qkv),
    slower_than=_attention_peers.faster_than_triton,
)  # fmt: skip
