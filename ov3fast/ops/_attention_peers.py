"""Attention by other libraries: PyTorch's own kernels (`sdpa`), cuDNN, FlashAttention-2 and -3, and xformers.

Each is a forward and a backward under flash_attention's contract: q, k, v [B,N,H,D] with any strides -> out [B,N,H,D]
contiguous and lse [B,H,N] (natural logarithm, of the scaled scores); backward -> (grad_q, grad_k, grad_v). `*_unsupported_reason` says
what a library can't do. Causal masks of flash-attn and of PyTorch's CUDA kernel are aligned bottom-right, as ours are.
FlashAttention's backward, PyTorch's build of it included, runs in its deterministic mode; of cuDNN only the forward is used, since PyTorch has no
such mode for its backward. xformers makes no promise of determinism, so no automatic choice takes it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_eager import has_blind_rows, visible_keys
from .flash_attention import register_backend

HALVES = (torch.bfloat16, torch.float16)


class Preference(NamedTuple):
    """Where an automatic choice prefers libraries to our Triton kernels, the best first."""

    capability: int
    """First digit of the GPU's compute capability."""
    direction: str
    """"forward" or "backward"."""
    head_dims: tuple[int, int]
    """From, and up to."""
    keys: int
    """At least so many."""
    backends: tuple[str, ...]
    reason: str


PREFERENCES = (
    Preference(
        8, "forward", (1, 64), 1, ("flash_attn", "sdpa"),
        "one chain of products on mma.sync: our estimate is 144 TFLOP/s at 1024 keys, and FlashAttention-2's, which PyTorch has too, is tuned for it",
    ),
    Preference(8, "forward", (81, 256), 1, ("flash_attn", "sdpa"), "as at 64; at 65 to 80 it pads to 96, where we tile 64 + 16"),
    Preference(8, "backward", (1, 64), 1, ("flash_attn", "sdpa"), "5 products where ours, which sum without atomics, take 7: estimated 113 TFLOP/s"),
    Preference(8, "backward", (81, 256), 1, ("flash_attn", "sdpa"), "as at 64"),
    Preference(
        9, "forward", (1, 64), 1024, ("flash_attn_3",),
        "392 and 460 TFLOP/s at 1k and 2k; Triton 382 and 396, cuDNN 373 and 395, and at 512 all are level",
    ),
    Preference(9, "forward", (97, 256), 1, ("flash_attn_3", "cudnn"), "467 and 497 TFLOP/s at 128 x 512, 565 and 574 at 1k; Triton 323 and 372"),
    Preference(9, "backward", (1, 64), 512, ("flash_attn_3",), "272 TFLOP/s at 512 and 363 at 1k; ours estimated 300 at 1k"),
    Preference(9, "backward", (97, 128), 512, ("flash_attn_3",), "316 TFLOP/s at 512 and 424 at 1k; ours estimated 350 at 1k"),
    Preference(10, "forward", (1, 128), 1, ("cudnn",), "ours are bound by issue slots, at half the rate of the tensor cores by the estimate"),
)  # fmt: skip
"""Rates are published ones of H100s (FlashAttention-3's paper) and this project's estimates (kernels/aot); nothing here was measured by us yet.

Not in it: cuDNN's backward, 266 and 348 TFLOP/s at 64 x 512 and 1k, which PyTorch calls without its deterministic mode; FlashAttention-2's backward on
an H100 (198 and 238, less in its deterministic mode); the packed backward, whose gradient we write in place, while a library's three would be
copied together. In between, ours run.
"""

# PyTorch's bfloat16 CPU backward is slow on short sequences: 94 ms against 11 ms in float32 for [288,17,6,32] on one Zen 5 core,
# 97 against 67 for [16,197,12,64], 162 against 210 for [2,1024,12,64]. Below this many keys it runs on float32 copies.
SHORT = 512


# PyTorch's kernels, in [B,H,N,D] on the CPU and [B,N,H,D] on CUDA.


def sdpa_unsupported_reason(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> str | None:
    if q.numel() == 0 or k.numel() == 0:
        return "it takes no empty tensor"
    if has_blind_rows(q, k, causal, prefix_len):
        return "some queries see no key"
    if q.device.type == "cpu":
        return None
    return (
        _cuda_unsupported_reason(q, k, causal, prefix_len) if q.device.type == "cuda" else f"it does not run on {q.device.type}"
    )


def sdpa_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cuda":
        q, k, v = (_unit_stride(t) for t in (q, k, v))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out, lse
    q_BHND, k_BHND, v_BHND = (_unit_stride(t).transpose(1, 2) for t in (q, k, v))
    square, mask = _cpu_mask(q, k, causal, prefix_len, q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHND, k_BHND, v_BHND, 0.0, square, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def sdpa_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> tuple[Tensor, ...]:
    if q.device.type == "cuda":
        return cuda_flash_backward(grad_out, q, k, v, out, lse, causal, scale)
    dtype = torch.float32 if q.dtype in HALVES and k.shape[1] < SHORT else q.dtype
    tensors = (_unit_stride(t.to(dtype)).transpose(1, 2) for t in (grad_out, q, k, v, out))
    square, mask = _cpu_mask(q, k, causal, prefix_len, dtype)
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, square, attn_mask=mask, scale=scale
    )
    return tuple(grad.transpose(1, 2).to(q.dtype).contiguous() for grad in grads)


def cuda_flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """PyTorch's build of FlashAttention-2 in its deterministic mode, which follows PyTorch's setting for all operators."""
    grad_out, q, k, v = (_unit_stride(t) for t in (grad_out, q, k, v))
    rng = torch.empty(0, dtype=torch.uint64, device=q.device)  # of the dropout, which is off
    with _deterministic():
        grads: tuple[Tensor, ...] = torch.ops.aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, rng, rng, scale=scale
        )
    return grads


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, without filling uninitialised memory with NaN."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # whose attributes are made at run time
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def _cpu_mask(q: Tensor, k: Tensor, causal: bool, prefix_len: int, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """The CPU kernel's (is_causal, additive mask): it knows the square causal case by itself, and no prefix."""
    visible = visible_keys(q.shape[1], k.shape[1], causal, prefix_len, q.device)
    if visible is None:
        return False, None
    if q.shape[1] == k.shape[1] and prefix_len == 0:
        return True, None
    return False, torch.zeros(visible.shape, dtype=dtype, device=q.device).masked_fill_(~visible, -torch.inf)[None, None]


# The flash-attn package, version 2.7 or later.


def flash_attn_unavailable_reason() -> str | None:
    return _package_unavailable_reason("flash_attn", "flash-attn")


def flash_attn_unsupported_reason(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> str | None:
    return _cuda_unsupported_reason(q, k, causal, prefix_len)


def flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    q, k, v = (_unit_stride(t) for t in (q, k, v))
    out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
    return out, lse


def flash_attn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> tuple[Tensor, ...]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    grad_out, q, k, v = (_unit_stride(t) for t in (grad_out, q, k, v))
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _flash_attn_backward(grad_out, q, k, v, out, lse, *grads, 0.0, scale, causal, -1, -1, 0.0, None, True, None)
    return grads


# FlashAttention-3: the module flash_attn_interface, which its repository's folder `hopper` installs.


def flash_attn_3_unavailable_reason() -> str | None:
    return _package_unavailable_reason(
        "flash_attn_interface", "flash-attn 3", "from the folder hopper of FlashAttention's repository"
    )


def flash_attn_3_unsupported_reason(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> str | None:
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it needs a GPU of compute capability 9"
    return _cuda_unsupported_reason(q, k, causal, prefix_len)


def flash_attn_3_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward

    q, k, v = (_unit_stride(t) for t in (q, k, v))
    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal)
    return out, lse


def flash_attn_3_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> tuple[Tensor, ...]:
    from flash_attn_interface import _flash_attn_backward

    grad_out, q, k, v = (_unit_stride(t) for t in (grad_out, q, k, v))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _flash_attn_backward(
        grad_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, is_causal=causal, deterministic=True
    )  # fmt: skip
    return dq, dk, dv


# cuDNN, as PyTorch calls it: [B,H,N,D], and a causal mask aligned top-left.


def cudnn_unavailable_reason() -> str | None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "it needs a CUDA device"
    version = torch.backends.cudnn.version() or 0
    return None if version >= 90000 else f"it needs cuDNN 9, found {version}"


def cudnn_unsupported_reason(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> str | None:
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] < 9:
        return "it needs a GPU of compute capability 9 or later"
    if causal and q.shape[1] != k.shape[1]:
        return "its causal mask is for as many queries as keys"
    if q.shape[-1] > 128:
        return f"head_dim must be at most 128, got {q.shape[-1]}"
    return _cuda_unsupported_reason(q, k, causal, prefix_len)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, Tensor]:
    q_BHND, k_BHND, v_BHND = (_unit_stride(t).transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHND, k_BHND, v_BHND, None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.reshape(q_BHND.shape[:3])


# The xformers package.


def xformers_unavailable_reason() -> str | None:
    return _package_unavailable_reason("xformers", "xformers")


def xformers_unsupported_reason(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> str | None:
    return _cuda_unsupported_reason(q, k, causal, prefix_len, dtypes=(*HALVES, torch.float32))


def xformers_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    q, k, v = (_unit_stride(t) for t in (q, k, v))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, _xformers_bias(causal), 0.0, scale)
    return out.contiguous(), lse[..., : q.shape[1]].contiguous()


def xformers_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> tuple[Tensor, ...]:
    from xformers.ops import fmha

    grad_out, q, k, v = (_unit_stride(t) for t in (grad_out, q, k, v))
    grads = fmha.memory_efficient_attention_backward(grad_out, out, lse, q, k, v, _xformers_bias(causal), 0.0, scale)
    return tuple(grad.contiguous() for grad in grads)


def _xformers_bias(causal: bool) -> Any:
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    return LowerTriangularFromBottomRightMask() if causal else None


def rule() -> str:
    """The automatic choice among CUDA backends, in words."""
    rows = "; ".join(
        f"capability {row.capability}.x {row.direction}, head_dim {row.head_dims[0]} to {row.head_dims[1]}"
        f"{f', {row.keys} keys or more' if row.keys > 1 else ''}: {', '.join(row.backends)}"
        for row in PREFERENCES
    )
    return f"the first that is ready and takes the call of: {rows}; else triton. The packed backward is triton's, which writes dQKV in place"


def faster_than_triton(direction: str, q: Tensor, k: Tensor | None = None, *_: Any) -> tuple[str, ...]:
    """What PREFERENCES has for q [B,N,H,D] (or qkv [B,N,3,H,D]) and k on their device."""
    if q.device.type != "cuda" or torch.version.hip:
        return ()
    capability, head_dim = torch.cuda.get_device_capability(q.device)[0], q.shape[-1]
    keys = (q if k is None else k).shape[1]
    for row in PREFERENCES:
        if (row.capability, row.direction) == (capability, direction) and row.head_dims[0] <= head_dim <= row.head_dims[1]:
            return row.backends if keys >= row.keys else ()
    return ()


@functools.cache
def _package_unavailable_reason(module: str, package: str, how: str = "pip install ov3fast[gpu]") -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"the package {package} is not installed ({how})"
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def _cuda_unsupported_reason(
    q: Tensor, k: Tensor, causal: bool, prefix_len: int, dtypes: tuple[torch.dtype, ...] = HALVES
) -> str | None:
    if q.device.type != "cuda":
        return "it needs CUDA tensors"
    if q.dtype not in dtypes:
        return f"it does not take {q.dtype}"
    if q.numel() == 0 or k.numel() == 0:
        return "it takes no empty tensor"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head_dim must be a multiple of 8 up to 256, got {q.shape[-1]}"
    if causal and prefix_len:
        return "it has no prefix_len"
    if has_blind_rows(q, k, causal, prefix_len):
        return "some queries see no key"
    return None


def _unit_stride(t: Tensor) -> Tensor:
    """t with a contiguous last axis, which the kernels require; the other axes may have any strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


register_backend("sdpa", sdpa_forward, sdpa_backward, unsupported_reason=sdpa_unsupported_reason)
register_backend(
    "flash_attn", flash_attn_forward, flash_attn_backward,
    unavailable_reason=flash_attn_unavailable_reason, unsupported_reason=flash_attn_unsupported_reason,
)  # fmt: skip
register_backend(
    "flash_attn_3", flash_attn_3_forward, flash_attn_3_backward,
    unavailable_reason=flash_attn_3_unavailable_reason, unsupported_reason=flash_attn_3_unsupported_reason,
)  # fmt: skip
register_backend(
    "cudnn", cudnn_forward, None,
    unavailable_reason=cudnn_unavailable_reason, unsupported_reason=cudnn_unsupported_reason,
)  # fmt: skip
register_backend(
    "xformers", xformers_forward, xformers_backward,
    unavailable_reason=xformers_unavailable_reason, unsupported_reason=xformers_unsupported_reason,
)  # fmt: skip
