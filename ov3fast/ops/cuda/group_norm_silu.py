"""Lays out group_norm_silu's arguments for csrc/cuda/group_norm_silu.cu: channels-last tensors alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._contracts import memory_format
from .. import _dispatch
from . import SUFFIX, THREADS, Launch, Struct, run, unavailable_reason, unsupported_reason

# Of a strip: positions of large maps, and how many strips small maps are cut into to keep a GPU busy. Neither depends on the GPU, so no result does.
PLACES = 256
BLOCKS = 256

# Which of the two GPU backends runs a call that both take, by how the CUDA kernels would read x. Estimated from their 16-byte shares (see the
# table of `make aot`), not measured yet.
FASTER = {"packs": "cuda", "single elements": "triton"}


class Plan:
    """How the kernels go through x, as N channels to a thread: the positions of a strip, the tiles of channels, the grid, and their Shape."""

    def __init__(self, x: Tensor, groups: int, *others: Tensor):
        self.B, self.C = x.shape[:2]
        self.G, self.S = groups, x.shape[2:].numel()
        fits = all(_in_packs(x, t) for t in (x, *others))
        self.N = 16 // x.element_size() if fits else 1
        self.suffix = SUFFIX[x.dtype] + ("" if fits else "_single")
        packs = -(-self.C // self.N)
        self.tiles = -(-packs // THREADS)
        self.columns = -(-packs // self.tiles)
        at_once = THREADS // self.columns
        rows = min(max(self.B * self.S * self.tiles // BLOCKS, 4 * at_once), max(PLACES, 4 * at_once))
        self.rows = -(-rows // at_once) * at_once
        self.strips = -(-self.S // self.rows)
        self.shape = Struct(
            ("i64", self.S), *(("i32", n) for n in (self.B, self.C, self.G, self.rows, self.strips, self.columns))
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.B * self.strips, self.tiles

    def parts(self, like: Tensor) -> Tensor:
        """Room for two numbers of each strip and channel."""
        return like.new_empty(self.B, self.strips, 2, self.C, dtype=torch.float32)

    def launch(self, step: str, grid: tuple[int, int], **arguments: Any) -> list[Launch]:
        """No launch where the grid is empty."""
        kernel = f"ov3_group_norm_silu_{step}"
        return [Launch("group_norm_silu", kernel, grid, (*arguments.items(), ("shape", self.shape)))] if all(grid) else []


def _forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    weight, bias = weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x, memory_format=memory_format(x))
    mean = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.shape[1] == 0:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    plan = Plan(x, num_groups, y, weight, bias)
    parts, wide = plan.parts(x), int(weight.dtype == torch.float32)
    run(
        plan.launch(f"moments_{plan.suffix}", plan.grid, x=x, parts=parts)
        + plan.launch("merge", (plan.B * plan.G, 1), parts=parts, eps=float(eps), mean=mean, rstd=rstd)
        + plan.launch(f"apply_{plan.suffix}", plan.grid, x=x, weight=weight, bias=bias, wide=wide, mean=mean, rstd=rstd, y=y),
        x.device,
    )
    return y, mean, rstd


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, need_x: bool, need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    none = x.new_empty(0)
    grad_x = torch.empty_like(x, memory_format=memory_format(x)) if need_x else none
    grad_weight, grad_bias = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if n else none for n in (need_weight, need_bias)
    )
    if x.shape[1] == 0:
        return grad_x, grad_weight, grad_bias
    grad_y = grad_y.contiguous(memory_format=memory_format(x))
    weight, bias, mean, rstd = (t.contiguous() for t in (weight, bias, mean, rstd))
    plan = Plan(x, mean.shape[1], grad_y, grad_x, weight, bias)
    parts, wide = plan.parts(x), int(weight.dtype == torch.float32)
    totals = parts.new_empty(plan.B, 2, plan.C)
    mean_sums, mean_dots = torch.empty_like(mean), torch.empty_like(mean)
    inputs = dict(grad_y=grad_y, x=x, weight=weight, bias=bias, wide=wide, mean=mean, rstd=rstd)
    group_blocks = -(-plan.B * plan.G // (THREADS // 32)) if need_x else 0
    channel_blocks = -(-plan.C // THREADS) if need_weight or need_bias else 0
    launches = (
        plan.launch(f"sums_{plan.suffix}", plan.grid, **inputs, parts=parts)
        + plan.launch("totals", (plan.B, -(-2 * plan.C // 32)), parts=parts, totals=totals)
        + plan.launch(
            f"finish_{SUFFIX[x.dtype]}", (group_blocks + channel_blocks, 1), totals=totals, weight=weight, wide=wide,
            mean_sums=mean_sums, mean_dots=mean_dots, grad_weight=grad_weight if need_weight else None,
            grad_bias=grad_bias if need_bias else None, group_blocks=group_blocks,
        )
    )  # fmt: skip
    if need_x:
        launches += plan.launch(
            f"grad_{plan.suffix}", plan.grid, **inputs, mean_sums=mean_sums, mean_dots=mean_dots, grad_x=grad_x
        )
    run(launches, x.device)
    return grad_x, grad_weight, grad_bias


def _unsupported_reason(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    return unsupported_reason(x, weight, bias) or _layout_obstacle(x)


def _layout_obstacle(x: Tensor) -> str | None:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and x.is_contiguous(memory_format=last):
        return None
    if x.is_contiguous() and (x.shape[2:].numel() == 1 or x.shape[1] == 1):
        return None
    return "it takes channels_last tensors alone"


def _in_packs(x: Tensor, tensor: Tensor) -> bool:
    """Whether threads can read the tensor's channels 16 bytes of x's at a time."""
    return x.shape[1] % (16 // x.element_size()) == 0 and tensor.data_ptr() % 16 == 0


def _slower_than(x: Tensor, *_: Any) -> tuple[str, ...]:
    return (FASTER["packs" if _in_packs(x, x) else "single elements"],)


_dispatch.register(
    "group_norm_silu", "cuda", _forward, _backward, operands=("x", "weight", "bias"),
    unavailable_reason=unavailable_reason, unsupported_reason=_unsupported_reason, slower_than=_slower_than,
)  # fmt: skip
