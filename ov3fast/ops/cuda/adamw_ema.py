"""Lays out adamw_ema_'s lists for csrc/cuda/adamw_ema.cu: two launches for up to CAPACITY tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _dispatch, _flat_lists
from . import SUFFIX, Field, Launch, Struct, run, unavailable_reason, unsupported_reason

_Batch = tuple[torch.dtype, torch.dtype, Struct, int]
"""The tensors of one launch: dtypes of params and grads, the kernel's Lists, and the number of its chunks."""

# As in the CUDA source.
CAPACITY = 512
CHUNK = 8192

# Blocks that read gradients for the norm: enough for every GPU, few enough for each block of the update to add their sums up again.
SUMS = 1024


def _forward(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor], step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: Sequence[float],
    max_norm: float | None, ema_decay: float | None, schedule: Tensor | None, norm: Tensor | None,
) -> Tensor:  # fmt: skip
    changed = [params, exp_avgs, exp_avg_sqs, *([ema] if ema else [])]
    (params_, *states, grads_), copies = _flat_lists.flatten([*changed, grads], len(changed))
    given = norm
    norm = torch.empty((), dtype=torch.float32, device=params[0].device)
    numbers = Struct(
        *_lerp(1 - beta1), *_lerp(1.0 - (1.0 if ema_decay is None else ema_decay)),
        ("f32", float(beta2)), ("f32", 1.0 - beta2), *_twofold(1 / math.sqrt(1 - beta2**step)), *_twofold(-lr / (1 - beta1**step)),
        ("f32", float(eps)), ("f32", math.nan if max_norm is None else float(max_norm)),
    )  # fmt: skip
    # With a schedule the kernel reads on the device what changes from step to step, and keep is the decay.
    keep = [1 - lr * decay for decay in weight_decay] if schedule is None else weight_decay
    scheduled = None if schedule is None else _on_device(schedule, beta1, beta2)
    exp_avgs_, exp_avg_sqs_, ema_ = states if ema else (*states, [])
    batches = [_batch(chosen, params_, grads_, exp_avgs_, exp_avg_sqs_, ema_, keep) for chosen in _alike(params_, grads_)]
    run(_launches(batches, numbers, scheduled, norm, given), norm.device)
    for tensor, copy in copies:
        tensor.copy_(copy)
    torch.autograd.graph.increment_version([t for values in changed for t in values if not t.is_inference()])
    return norm


def _launches(
    batches: list[_Batch], numbers: Struct, scheduled: Tensor | None, norm: Tensor, given: Tensor | None
) -> list[Launch]:
    """The sums of squares of every batch's gradients, into one row of partial sums, then the updates, of which the first writes the norm.

    given: that norm, where it is known: its square is then the only partial sum."""
    blocks = [min(chunks, SUMS) for _, _, _, chunks in batches]
    partials = norm.new_empty(sum(blocks)) if given is None else given.square().reshape(1)
    squares: list[Launch] = []
    updates: list[Launch] = []
    done = 0
    for (params, grads, lists, chunks), count in zip(batches, blocks, strict=True):
        if given is None:
            kernel, own = f"ov3_adamw_ema_squares_{SUFFIX[grads]}", partials[done : done + count]
            squares.append(Launch("adamw_ema", kernel, (count, 1), (("lists", lists), ("partials", own))))
        kernel = f"ov3_adamw_ema_update_{SUFFIX[params]}_{SUFFIX[grads]}"
        arguments = (
            ("lists", lists),
            ("step", numbers),
            ("scheduled", scheduled),
            ("partials", partials),
            ("parts", len(partials)),
        )
        updates.append(Launch("adamw_ema", kernel, (chunks, 1), (*arguments, ("norm", None if updates else norm))))
        done += count
    if not batches:
        norm.copy_(norm.new_zeros(()) if given is None else given)
    return squares + updates


def _alike(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors of one launch: of one pair of dtypes, CAPACITY at most, none of them empty."""
    kinds: dict[torch.dtype, list[int]] = {}
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        if p.numel():
            kinds.setdefault(g.dtype, []).append(i)
    return [chosen[at : at + CAPACITY] for chosen in kinds.values() for at in range(0, len(chosen), CAPACITY)]


def _batch(
    chosen: list[int], params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], ema: Sequence[Tensor], keep: Sequence[float],
) -> _Batch:  # fmt: skip
    """dtypes of params and grads, the kernel's Lists, and the number of its chunks."""
    sizes, first = [params[i].numel() for i in chosen], [0]
    for size in sizes:
        first.append(first[-1] - (-size // CHUNK))
    addresses: tuple[Sequence[Tensor | None], ...] = (params, grads, exp_avgs, exp_avg_sqs, ema or [None] * len(params))
    lists = Struct(
        *(("ptr", [values[i] for i in chosen], CAPACITY) for values in addresses),
        ("i64", sizes, CAPACITY), ("f32", [keep[i] for i in chosen], CAPACITY), ("i32", first[:-1], CAPACITY),
        ("i32", len(chosen)), ("i32", first[-1]),
    )  # fmt: skip
    return params[chosen[0]].dtype, grads[chosen[0]].dtype, lists, first[-1]


def _on_device(schedule: Tensor, beta1: float, beta2: float) -> Tensor:
    """(step, lr, ema_decay) -> the kernel's Scheduled: float32 [7]."""
    step, lr, ema_decay = schedule.unbind()
    root, size, weight = (1 - beta2**step).rsqrt(), -lr / (1 - beta1**step), 1 - ema_decay
    from_a = (weight < 0.5).double()
    twofold = [part for x in (root, size) for high in (x.float().double(),) for part in (high, x - high)]
    return torch.stack([*twofold, weight + from_a - 1, from_a, lr]).float()


def _lerp(weight: float) -> tuple[Field, Field]:
    """The fields of a Lerp: a + weight (b - a) from the nearer end."""
    return ("f32", weight if weight < 0.5 else weight - 1.0), ("i32", int(weight < 0.5))


def _twofold(x: float) -> tuple[Field, Field]:
    """The fields of a Twofold: x rounded to float32, and what is left."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return ("f32", high), ("f32", x - high)


def _unsupported_reason(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor],
) -> str | None:  # fmt: skip
    states = *exp_avgs, *exp_avg_sqs, *ema
    if params[0].dtype == torch.float16:
        return "it does not take torch.float16"
    return unsupported_reason(*params, *grads, *states) or _flat_lists.dtype_obstacle(params, grads, states)


_dispatch.register(
    "adamw_ema_", "cuda", _forward, operands=("params", "grads", "exp_avgs", "exp_avg_sqs", "ema"),
    unavailable_reason=unavailable_reason, unsupported_reason=_unsupported_reason,
)  # fmt: skip
