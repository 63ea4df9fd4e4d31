"""The Triton backend: kernels of `ov3fast.kernels`, imported at an operator's first call, so that `import ov3fast` stays light.

They run on CUDA and ROCm tensors; with TRITON_INTERPRET=1 (set before Triton is imported) Triton's interpreter runs them on CPU tensors, for
tests. KERNELS names each operator's file; its functions `forward` and `backward` keep the contract of the operator's eager backend
(contrastive_loss: of `over_views` and `over_ranks`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.contrastive.config import is_few
from .. import _attention_peers, _dispatch
from .._contrastive_ranks import is_alone, over_ranks, over_views

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(NamedTuple):
    """How the kernels of one operator are called."""

    module: str
    """Below ov3fast.kernels."""
    operands: tuple[str, ...]
    """The arguments whose device, dtype and width decide whether the kernels take a call."""
    widest: int | None = None
    """Largest size of the first operand's last axis."""
    axis: str = "the last axis"
    """What that axis is called in a refusal."""
    forward: str = "forward"
    backward: str | None = "backward"


KERNELS = {
    "contrastive_loss": Kernels("contrastive.launch", ("image", "text")),
    "flash_attention": Kernels("attention.launch", ("q", "k", "v"), widest=256, axis="head_dim"),
    "flash_attention_qkvpacked": Kernels(
        "attention.launch",
        ("qkv",),
        widest=256,
        axis="head_dim",
        forward="forward_packed",
        backward="backward_packed",
    ),
    "group_norm_silu": Kernels("group_norm_silu", ("x", "weight", "bias")),
    "latent_projection": Kernels("latent_projection", ("tokens", "weight")),
    "layer_norm": Kernels("layer_norm", ("x", "weight"), widest=8192),
    "linear": Kernels("linear", ("x", "weight")),
    "linear_cross_entropy": Kernels("linear_cross_entropy", ("hidden", "weight")),
    "linear_cross_entropy_total": Kernels("linear_cross_entropy", ("hidden", "weight"), forward="total", backward="scale"),
    "mlp": Kernels("mlp", ("x", "w1")),
    "noise_projection": Kernels("noise_projection", ("z", "sigma", "weight", "rng")),
    "patch_embed": Kernels("patch_embed", ("latents", "weight", "rng")),
    "random_normal": Kernels("random_normal", ("rng", "dtype"), backward=None),
    "rms_norm": Kernels("rms_norm", ("x", "weight"), widest=8192),
    "rope": Kernels("rope", ("qkv", "cos", "q_weight"), widest=256, axis="head_dim"),
    "swiglu": Kernels("swiglu", ("x",)),
}


@functools.cache
def unavailable_reason() -> str | None:
    """Why the backend can't run at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    return None


def unsupported_reason(
    *operands: Tensor | torch.dtype | None, widest: int | None = None, axis: str = "the last axis"
) -> str | None:
    """Why the kernels can't take these operands, or None: float32, bfloat16 and float16 (and int64) on a GPU."""
    device = "cpu" if INTERPRETED else "cuda"
    for operand in operands:
        if operand is None:
            continue
        if isinstance(operand, Tensor) and operand.device.type != device:
            return f"it does not run on {operand.device.type}"
        dtype = operand.dtype if isinstance(operand, Tensor) else operand
        if dtype not in DTYPES and dtype != torch.int64:
            return f"it does not take {dtype}"
    first = operands[0]
    if widest is not None and isinstance(first, Tensor) and first.shape[-1] > widest:
        return f"{axis} must be at most {widest}, got {first.shape[-1]}"
    return None


def launch(module: str, function: str) -> Callable[..., Any]:
    """`function` of `ov3fast.kernels.<module>`, imported at the first call, on its first tensor's device: Triton launches on the current one."""
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"ov3fast.kernels.{module}"), function))
        device = (args[0] if isinstance(args[0], Tensor) else next(arg for arg in args if isinstance(arg, Tensor))).get_device()
        if device < 0 or device == torch.cuda.current_device():
            return found[0](*args)
        with torch.cuda.device(device):
            return found[0](*args)

    return call


def planned(function: Callable[..., Any], where: Callable[[Sequence[Any]], bool] | None = None) -> Callable[..., Any]:
    """`function` for calls of one kind: what it works out from that is worked out once. See ov3fast/kernels/lib/plan.py."""
    made: Callable[..., Any] = importlib.import_module("ov3fast.kernels.lib.plan").planned(function, where)
    return made


def _without_b1(backward: Callable[..., Any]) -> Callable[..., Any]:
    """mlp's backward for kernels that have the bias in h."""
    return lambda grad_y, x, h, w1, b1, *rest: backward(grad_y, x, h, w1, *rest)


def _by_pairs(few: Callable[..., Any], many: Callable[..., Any], of_ranks: Callable[..., Any]) -> Callable[..., Any]:
    """contrastive_loss in one direction: for a few or for many pairs that are all here, or for a rank's. The image is the first matrix."""

    def call(*args: Any) -> Any:
        image = next(arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1)
        if is_alone(args) and image.numel():
            return (few if is_few(image) else many)(*args)
        return of_ranks(*args)

    return call


def _to_pytorch(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    """linear's products are PyTorch's on either backend, and its own autograd nodes take less host time. Weights of another dtype are ours to round."""
    return ("eager",) if x.dtype == weight.dtype else ()


for _op, _kernels in KERNELS.items():
    _forward = launch(_kernels.module, _kernels.forward)
    _backward = None if _kernels.backward is None else launch(_kernels.module, _kernels.backward)
    _options: dict[str, Any] = {}
    if _op == "mlp":
        _backward = _without_b1(launch(_kernels.module, "backward"))
        _forward.inference = launch(_kernels.module, "inference")  # type: ignore[attr-defined]  # writes no pre-activation
    elif _op == "contrastive_loss":  # the views and the ranks are the operator's own
        _forward, _backward = map(
            _by_pairs,
            over_views(*(launch("contrastive.few", name) for name in ("forward", "backward"))),
            over_views(*(launch(_kernels.module, name) for name in ("forward", "backward"))),
            over_ranks(*(launch(_kernels.module, name) for name in ("forward_rows", "backward_rows", "project"))),
        )
    elif _op == "linear":
        _options["slower_than"] = _to_pytorch
    elif _op.startswith("flash_attention"):
        _options["slower_than"] = functools.partial(_attention_peers.faster_than_triton, "forward")
        _options["slower_than_backward"] = functools.partial(_attention_peers.faster_than_triton, "backward")
        if _op.endswith("packed"):  # whose backward writes dQKV in place, as no library does
            _options["slower_than_backward"] = lambda *_: ()
    _dispatch.register(
        _op, "triton", _forward, _backward, operands=_kernels.operands, unavailable_reason=unavailable_reason,
        unsupported_reason=functools.partial(unsupported_reason, widest=_kernels.widest, axis=_kernels.axis),
        of_one_kind=functools.partial(planned, where=is_alone) if _op == "contrastive_loss" else planned, **_options,
    )  # fmt: skip
