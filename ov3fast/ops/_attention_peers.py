"""Attention by libraries that others wrote: PyTorch's own kernels (`sdpa`), cuDNN's, FlashAttention-2 and -3, and xformers.

Each is a forward and a backward under flash_attention's contract: q, k, v [B,N,H,D] with any strides -> out [B,N,H,D]
contiguous and lse [B,H,N] (natural logarithm, of the scaled scores); backward -> (grad_q, grad_k, grad_v). `*_unsupported_reason` says
what a library can't do. Causal masks of flash-attn and of PyTorch's CUDA kernel are aligned bottom-right, as ours are.
Whether a CUDA peer repeats its bits is its own affair: PyTorch's asks for torch.use_deterministic_algorithms. The ones that an
automatic choice takes do: FlashAttention's backward runs in its deterministic mode, and of cuDNN's only the forward is used.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)

FASTER = {8: ("flash_attn",), 9: ("flash_attn_3", "cudnn"), 10: ("cudnn",)}
"""First digit of a GPU's compute capability -> what an automatic choice prefers to Triton, the best first, where it is installed and takes
the call: by published rates (FlashAttention-2's paper for A100, -3's for H100, and that cuDNN has kernels for B200's instructions)."""

# PyTorch's bfloat16 CPU backward is slow on short sequences: 94 ms against 11 ms in float32 for [288,17,6,32] on one Zen 5 core,
# 97 against 67 for [16,197,12,64], 162 against 210 for [2,1024,12,64]. Below this many keys it runs on float32 copies.
SHORT = 512


def visible_keys(queries: int, keys: int, causal: bool, prefix_len: int, device: torch.device) -> Tensor | None:
    """[queries, keys] bool, true where query i sees key j: j <= i + keys - queries or j < prefix_len. None where all see all."""
    if not causal or queries == 1 or prefix_len >= keys:
        return None
    key = torch.arange(keys, device=device)
    last = torch.arange(keys - queries, keys, device=device)
    return (key <= last[:, None]) | (key < prefix_len)


def has_blind_rows(q: Tensor, k: Tensor, causal: bool, prefix_len: int) -> bool:
    """Whether some query sees no key at all."""
    return k.shape[1] == 0 or (causal and q.shape[1] > k.shape[1] and prefix_len == 0)


# PyTorch's kernels, in [B,H,N,D] on the CPU and [B,N,H,D] on CUDA.


def sdpa_unsupported_reason(q, k, v, causal, prefix_len, scale) -> str | None:
    if q.numel() == 0 or k.numel() == 0:
        return "it takes no empty tensor"
    if has_blind_rows(q, k, causal, prefix_len):
        return "some queries see no key"
    if q.device.type == "cpu":
        return None
    return (
        _cuda_unsupported_reason(q, k, causal, prefix_len) if q.device.type == "cuda" else f"it does not run on {q.device.type}"
    )


def sdpa_forward(q, k, v, causal, prefix_len, scale):
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


def sdpa_backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
    if q.device.type == "cuda":
        grad_out, q, k, v = (_unit_stride(t) for t in (grad_out, q, k, v))
        rng = torch.empty(0, dtype=torch.uint64, device=q.device)  # of the dropout, which is off
        return torch.ops.aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, rng, rng, scale=scale
        )
    dtype = torch.float32 if q.dtype in HALVES and k.shape[1] < SHORT else q.dtype
    tensors = (_unit_stride(t.to(dtype)).transpose(1, 2) for t in (grad_out, q, k, v, out))
    square, mask = _cpu_mask(q, k, causal, prefix_len, dtype)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, square, attn_mask=mask, scale=scale
    )
    return tuple(grad.transpose(1, 2).to(q.dtype).contiguous() for grad in grads)


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


def flash_attn_unsupported_reason(q, k, v, causal, prefix_len, scale) -> str | None:
    return _cuda_unsupported_reason(q, k, causal, prefix_len)


def flash_attn_forward(q, k, v, causal, prefix_len, scale):
    from flash_attn.flash_attn_interface import _flash_attn_forward

    q, k, v = (_unit_stride(t) for t in (q, k, v))
    out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
    return out, lse


def flash_attn_backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
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


def flash_attn_3_unsupported_reason(q, k, v, causal, prefix_len, scale) -> str | None:
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it needs a GPU of compute capability 9"
    return _cuda_unsupported_reason(q, k, causal, prefix_len)


def flash_attn_3_forward(q, k, v, causal, prefix_len, scale):
    from flash_attn_interface import _flash_attn_forward

    q, k, v = (_unit_stride(t) for t in (q, k, v))
    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal)
    return out, lse


def flash_attn_3_backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
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


def cudnn_unsupported_reason(q, k, v, causal, prefix_len, scale) -> str | None:
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] < 9:
        return "it needs a GPU of compute capability 9 or later"
    if causal and q.shape[1] != k.shape[1]:
        return "its causal mask is for as many queries as keys"
    if q.shape[-1] > 128:
        return f"head_dim must be at most 128, got {q.shape[-1]}"
    return _cuda_unsupported_reason(q, k, causal, prefix_len)


def cudnn_forward(q, k, v, causal, prefix_len, scale):
    q_BHND, k_BHND, v_BHND = (_unit_stride(t).transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHND, k_BHND, v_BHND, None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.reshape(q_BHND.shape[:3])


# The xformers package.


def xformers_unavailable_reason() -> str | None:
    return _package_unavailable_reason("xformers", "xformers")


def xformers_unsupported_reason(q, k, v, causal, prefix_len, scale) -> str | None:
    return _cuda_unsupported_reason(q, k, causal, prefix_len, dtypes=(*HALVES, torch.float32))


def xformers_forward(q, k, v, causal, prefix_len, scale):
    from xformers.ops import fmha

    q, k, v = (_unit_stride(t) for t in (q, k, v))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, _xformers_bias(causal), 0.0, scale)
    return out.contiguous(), lse[..., : q.shape[1]].contiguous()


def xformers_backward(grad_out, q, k, v, out, lse, causal, prefix_len, scale):
    from xformers.ops import fmha

    grad_out, q, k, v = (_unit_stride(t) for t in (grad_out, q, k, v))
    grads = fmha.memory_efficient_attention_backward(grad_out, out, lse, q, k, v, _xformers_bias(causal), 0.0, scale)
    return tuple(grad.contiguous() for grad in grads)


def _xformers_bias(causal: bool):
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    return LowerTriangularFromBottomRightMask() if causal else None


def rule() -> str:
    """The automatic choice among CUDA backends, in words."""
    libraries = "; ".join(f"capability {capability}.x: {', '.join(names)}" for capability, names in FASTER.items())
    return f"the first that is ready and takes the call of: {libraries}; then triton. The packed backward is triton's, which writes dQKV in place"


def faster_than_triton(q: Tensor, *_) -> tuple[str, ...]:
    """FASTER's row for the device of q."""
    if q.device.type != "cuda" or torch.version.hip:
        return ()
    return FASTER.get(torch.cuda.get_device_capability(q.device)[0], ())


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
    """The kernels read the last axis as contiguous and leave the others to strides."""
    return t if t.stride(-1) == 1 else t.contiguous()
