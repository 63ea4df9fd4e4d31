"""Calls of the operators by size, and which backend is fastest on them here: what `ov3fast tune --device cpu` measures."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _choice, _dispatch, random
from ._choice import MIXED, Choice
from .contrastive_loss import contrastive_loss
from .flash_attention import flash_attention
from .group_norm_silu import group_norm_silu
from .latent_projection import latent_projection
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mlp import mlp
from .noise_projection import noise_projection
from .patch_embed import patch_embed

BACKENDS = tuple(
    name for name in _dispatch.PREFERENCE if name not in ("cuda", "triton", "flash_attn_3", "flash_attn", "cudnn", "xformers")
)
"""What an automatic choice can take on a CPU."""

OUT_OF_BOUNDS = {("flash_attention", "eager"): "it keeps N x N numbers"}
"""Backends that an automatic choice never takes."""

WITHIN = 0.97
"""Our kernels keep a call unless another backend takes less than this share of their time, so that a tie changes no bits."""

FAR = 4.0
"""A backend this many times slower than the fastest is timed once."""

SIZES = {
    "linear": ((2304, 192, 576), (256, 768, 768), (2048, 768, 2304)),
    "mlp": ((2304, 192, 768), (256, 768, 3072), (1024, 768, 3072)),
    "flash_attention": ((432, 17, 64), (96, 256, 64), (16, 1024, 64)),
    "contrastive_loss": ((144, 192), (2048, 768)),
    "linear_cross_entropy": ((240, 192, 600), (512, 768, 16000)),
    "linear_cross_entropy_total": ((240, 192, 600), (512, 768, 16000)),
    "layer_norm": ((2304, 192), (2048, 768), (16384, 768)),
    "group_norm_silu": ((8, 64, 4096), (1, 128, 65536)),
    "patch_embed": ((144, 64, 192), (64, 1024, 768)),
    "latent_projection": ((768, 192, 64), (16384, 768, 64)),
    "noise_projection": ((768, 192), (4096, 768)),
}
"""Operator -> the sizes tried, in the dimensions of _choice.DIMENSIONS."""

WITH_MIXED = ("linear", "mlp")


class Trial(NamedTuple):
    operator: str
    dtype: str
    size: tuple[int, ...]


def trials(only: str = "", dtype: str = "") -> Iterator[Trial]:
    """Those whose operator contains `only`, in one dtype or all."""
    for op, sizes in SIZES.items():
        for kind in (*_choice.DTYPES.values(), *([MIXED] if op in WITH_MIXED else [])):
            for size in sizes:
                if only in op and dtype in kind:
                    yield Trial(op, kind, size)


def call(trial: Trial) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function and its leaves, which all want gradients. Random values, the same each time."""
    activations = torch.float32 if trial.dtype == "fp32" else torch.bfloat16
    parameters = torch.float32 if trial.dtype == MIXED else activations
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int, dtype: torch.dtype = parameters) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype).requires_grad_()

    op, size = trial.operator, trial.size
    if op == "linear":
        rows, inputs, outputs = size
        return linear, [values(rows, inputs, dtype=activations), values(outputs, inputs), values(outputs)]
    if op == "mlp":
        rows, width, hidden = size
        matrices = [values(hidden, width), values(hidden), values(width, hidden), values(width)]
        return mlp, [values(rows, width, dtype=activations), *matrices]
    if op == "flash_attention":
        sequences, tokens, width = size
        return flash_attention, [values(sequences // 4, tokens, 4, width) for _ in range(3)]
    if op == "contrastive_loss":
        return contrastive_loss, [values(*size), values(*size), torch.tensor(20.0, requires_grad=True)]
    if op.startswith("linear_cross_entropy"):
        rows, width, classes = size
        labels = torch.randint(classes, (rows,), generator=generator)
        reduction = "mean" if op.endswith("total") else "none"
        return lambda h, w: linear_cross_entropy(h, w, labels, reduction=reduction), [
            values(rows, width),
            values(classes, width),
        ]
    if op == "layer_norm":
        residual = values(*size).detach()
        return lambda x, w, b: layer_norm(x, w, b, residual=residual)[0], [values(*size), values(size[1]), values(size[1])]
    if op == "group_norm_silu":
        samples, channels, pixels = size
        side = math.isqrt(pixels)
        x = values(samples, channels, side, pixels // side).detach().to(memory_format=torch.channels_last).requires_grad_()
        return lambda x, w, b: group_norm_silu(x, 32, w, b), [x, values(channels), values(channels)]
    if op == "patch_embed":
        samples, pixels, width = size
        side = math.isqrt(pixels)
        latents = values(samples, 16, side, side, dtype=torch.float32).detach()
        return lambda *p: patch_embed(latents, *p), [
            values(width, 64),
            values(width),
            values(1 + pixels // 4, width),
            values(width),
        ]
    if op == "latent_projection":
        rows, width, outputs = size
        side = 16 if rows % 256 == 0 else 1
        features = values(rows // side**2, side**2, width)
        return lambda t, w, b: latent_projection(t, w, b, grid=(side, side)), [
            features,
            values(outputs, width),
            values(outputs),
        ]
    if op == "noise_projection":
        rows, width = size
        sigma, rng = torch.rand(rows // 16, generator=generator), random.make_rng(1, device="cpu")
        z = values(rows // 16, 16, width).detach()
        return lambda w, b: noise_projection(z, sigma, w, b, rng=rng), [values(width, width), values(width)]
    raise ValueError(f"no trial of {op}")


def measure(trial: Trial, budget: float) -> list[Choice]:
    """The choices for its forward and its backward call, from medians of turns for about `budget` seconds each."""
    settle()
    op = trial.operator
    function, leaves = call(trial)
    upstream = torch.ones_like(function(*leaves))

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, upstream)

    names = [n for n in BACKENDS if _dispatch.table()[op].get(n) == "ready" and (op, n) not in OUT_OF_BOUNDS]
    total = op == "linear_cross_entropy_total"
    forward_times = medians(both if total else forward, names, budget)
    choices = [pick(op, "forward", trial.dtype, trial.size, forward_times)]
    if not total:  # its forward computes the gradients
        both_times = medians(both, names, budget)
        first = forward_times[choices[0].backend]
        after_it = {name: both_times[name] - forward_times[name] + first for name in names}
        choices.append(pick(op, "backward", trial.dtype, trial.size, after_it))
    return choices


def settle() -> None:
    """Brings glibc's allocator to where a training process has it.

    Freeing a tensor of almost 32 MB raises its thresholds for good; until then results of some MB are unmapped when they are freed, and
    every call pays for new pages, up to ten times its own time.
    """
    torch.empty(2**23 - 2**12)


def medians(run: Callable[[], object], names: list[str], budget: float) -> dict[str, float]:
    """Seconds of a run on each backend, in turn."""

    def seconds(name: str) -> float:
        with _dispatch.use(name):
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

    for name in names:
        seconds(name)
    once = {name: seconds(name) for name in names}
    near = [name for name in names if once[name] <= FAR * min(once.values())]
    found: dict[str, list[float]] = {name: [once[name]] for name in names}
    began, turns = time.perf_counter(), 0
    while turns < 4 or (time.perf_counter() - began < budget and turns < 40):
        for name in reversed(near) if turns % 2 else near:
            found[name].append(seconds(name))
        turns += 1
    return {name: statistics.median(values) for name, values in found.items()}


def pick(op: str, direction: str, dtype: str, size: tuple[int, ...], times: dict[str, float]) -> Choice:
    """The first backend, ours before others, that takes at most the fastest one's time over WITHIN."""
    limit = min(times.values()) / WITHIN
    backend = next(name for name in _dispatch.PREFERENCE if times.get(name, math.inf) <= limit)
    others = {name: value for name, value in times.items() if name != backend}
    over = min(others, key=lambda name: others[name], default="")
    ratio = others[over] / max(times[backend], 1e-9) if over else math.nan
    return Choice(op, direction, dtype, size, backend, ratio, over)
