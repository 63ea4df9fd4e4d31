"""AdamW with gradient clipping and an exponential moving average of the weights, over lists of tensors, in place.

    norm = sqrt(sum of g^2 over all elements of all gradients)
    g <- g min(1, max_norm / (norm + 1e-6))                     (with max_norm; the gradients themselves stay as they are)
    m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr weight_decay) p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    ema <- ema_decay ema + (1 - ema_decay) p                    (of p as stored)

params p of one dtype (float32, bfloat16 or float64) and any shapes, grads g in it or in float32; exp_avgs m, exp_avg_sqs v and
ema in float32 (float64 for float64 parameters). bfloat16 parameters are rounded to nearest, which loses steps below
p / 256: train on float32 weights where that matters. With max_norm, a norm that is not finite leaves all as it was (max_norm = inf
clips nothing and keeps this guard); without max_norm the norm is not checked, and everything becomes NaN. Where the tensors are shards
of the parameters, the caller passes the norm over all shards.
Source: Loshchilov & Hutter 2019 (arXiv 1711.05101); clipping as torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _check, _dispatch, _flat_lists, _operator, cpu
from ._calls import Call, Draw

# The update runs over consecutive tensors of about this many elements at a time, so that they stay in the cache.
BUCKET = 2**18


@torch.no_grad()
def reference(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor] | None = None, *, step: int, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float | Sequence[float], max_norm: float | None = None, ema_decay: float | None = None,
    norm: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Plain PyTorch, the specification, one tensor at a time."""
    wide = exp_avgs[0].dtype
    if norm is None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.to(wide)) for g in grads]))
    if max_norm is not None and not norm.isfinite():
        return norm
    clip = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    decays = weight_decay if isinstance(weight_decay, Sequence) else [weight_decay] * len(params)
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(wide) * clip
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        denominator = (v.sqrt() / math.sqrt(1 - betas[1] ** step)).add_(eps)
        p.copy_((p.to(wide) * (1 - lr * decays[i])).addcdiv_(m, denominator, value=-lr / (1 - betas[0] ** step)))
        if ema is not None:
            ema[i].lerp_(p.to(wide), 1 - (ema_decay or 0.0))
    return norm


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor] | None = None,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    max_norm: float | None = None,
    ema_decay: float | Tensor | None = None,
    norm: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """One step: params, exp_avgs, exp_avg_sqs and ema change in place; the gradients' global norm before clipping comes back.

    The lists have one tensor per parameter, in one order. step counts from 1. weight_decay: one number, or one per parameter
    (0.0 for norms and biases, say). ema and ema_decay: both or neither. With max_norm nothing changes where the norm is not
    finite. Returns a scalar, float32 (float64 for float64).

    step, lr and ema_decay may be scalar tensors on the parameters' device, for a step that is captured in a CUDA graph: their values are
    read on the device, so the CPU kernels don't take them, and are not range-checked.
    norm: the gradients' global norm where the lists hold shards, a scalar in the moments' dtype on their device; it is used for clipping and
    returned. None: the norm of `grads`.
    Raises TypeError or ValueError that name the argument; NotImplementedError for tensors that are differentiated in forward mode or
    transformed by torch.func: there is no derivative. As in torch.optim, a graph behind the gradients is ignored.
    """
    op = "adamw_ema_"
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if (ema is None) != (ema_decay is None):
        raise ValueError(f"{op}: ema and ema_decay must be given together, got {'ema_decay' if ema is None else 'ema'} alone")
    if ema is not None:
        lists["ema"] = ema
    decays = [float(d) for d in weight_decay] if isinstance(weight_decay, Sequence) else [float(weight_decay)] * len(params)
    _check_lists(op, {**lists, "weight_decay": decays})
    _check_numbers(op, step, lr, betas, eps, max_norm, ema_decay)
    if not params:
        return torch.zeros(())
    if norm is not None:
        _check.tensor(op, "norm", norm, dtypes=(_check.accumulate_dtype(params[0].dtype),))
        _check.shape(op, "norm", norm, (), "a scalar")
        _check.same_device(op, "norm", norm, params[0])
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        numbers = {"lr": lr, "ema_decay": ema_decay}
        _refuse_derivatives(op, lists | {name: [value] for name, value in numbers.items() if isinstance(value, Tensor)})
    with torch.no_grad():
        schedule = None
        if any(isinstance(value, Tensor) for value in (step, lr, ema_decay)):
            schedule = _schedule(op, {"step": step, "lr": lr, "ema_decay": ema_decay}, params[0].device)
            step, lr, ema_decay = 1, 0.0, None if ema_decay is None else 0.0
        norm = _adamw_ema_(
            impl, *(list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, ema or [])),
            step, lr, *betas, eps, decays, max_norm, ema_decay, schedule, norm,
        )  # fmt: skip
    return norm


def _schedule(op: str, numbers: dict[str, int | float | Tensor | None], device: torch.device) -> Tensor:
    """step, lr and ema_decay (0 where there is none) as one float64 tensor [3]. Nothing is copied from the host."""
    values = []
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.device != device:
                raise ValueError(f"{op}: {name} must be a scalar on {device}, got shape {tuple(value.shape)} on {value.device}")
            values.append(value.detach().reshape(()).double())
        else:
            values.append(torch.full((), value or 0.0, dtype=torch.float64, device=device))
    return torch.stack(values)


def _refuse_derivatives(op: str, lists: dict[str, Sequence[Tensor]]) -> None:
    """An update in place would silently drop tangents and torch.func's gradients."""
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            if wrapped or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None):
                raise NotImplementedError(
                    f"{op}: {name}[{i}] is differentiated or batched, and an update in place has no derivative; detach it"
                )


def _check_lists(op: str, lists: dict[str, Sequence[Any]]) -> None:
    params, decays = lists["params"], lists["weight_decay"]
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{op}: {name} must have one entry per parameter, {len(params)}, got {len(values)}")
    if params and all(
        values is decays or _fit(values, params, narrow=name in ("params", "grads")) for name, values in lists.items()
    ):
        return  # the common case; what follows works out which error to raise
    for i, p in enumerate(params):
        _check.tensor(op, f"params[{i}]", p)
        if p.dtype != params[0].dtype or p.device != params[0].device:
            first = f"{params[0].dtype} on {params[0].device}"
            raise TypeError(f"{op}: params must be alike, got params[{i}] {p.dtype} on {p.device}, the first {first}")
        wide = _check.accumulate_dtype(p.dtype)
        for name, values in lists.items():
            if values is params or values is decays:
                continue
            dtypes = dict.fromkeys((p.dtype, wide)) if name == "grads" else (wide,)
            _check.tensor(op, f"{name}[{i}]", values[i], dtypes=tuple(dtypes))
            _check.shape(op, f"{name}[{i}]", values[i], tuple(p.shape), "like its parameter")
            _check.same_device(op, f"{name}[{i}]", values[i], p)


def _fit(values: Sequence[Any], params: Sequence[Any], narrow: bool) -> bool:
    """Whether tensors are like their parameters, on one device, and all of the first parameter's dtype (`narrow`) or all wide."""
    first = params[0]
    if not isinstance(first, Tensor) or first.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return False
    dtype, device = first.dtype if narrow else _check.accumulate_dtype(first.dtype), first.device
    return all(
        isinstance(value, Tensor) and value.dtype is dtype and value.device == device and value.shape == p.shape
        for value, p in zip(values, params, strict=True)
    )


def _check_numbers(
    op: str, step: int | Tensor, lr: float | Tensor, betas: tuple[float, float], eps: float, max_norm: float | None,
    ema_decay: float | Tensor | None,
) -> None:  # fmt: skip
    if not isinstance(step, Tensor) and (not isinstance(step, int) or step < 1):
        raise ValueError(f"{op}: step must be an integer from 1 on, got {step!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{op}: betas must be two numbers in [0, 1), got {betas!r}")
    for name, value in (("lr", lr), ("eps", eps)):
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {value!r}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"{op}: max_norm must be above 0 or None, got {max_norm!r}")
    if ema_decay is not None and not isinstance(ema_decay, Tensor) and not 0 <= ema_decay <= 1:
        raise ValueError(f"{op}: ema_decay must be in [0, 1], got {ema_decay!r}")


# Lists at once (_foreach_*), several times as fast as the reference's loop over tensors.
def _forward_eager(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    ema: list[Tensor], step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: Sequence[float],
    max_norm: float | None, ema_decay: float | None, schedule: Tensor | None, norm: Tensor | None,
) -> Tensor:  # fmt: skip
    if schedule is not None:
        return _forward_on_device(
            params, grads, exp_avgs, exp_avg_sqs, ema, beta1, beta2, eps, weight_decay, max_norm, schedule, norm
        )
    wide = exp_avgs[0].dtype
    norm = _norm(grads, wide) if norm is None else norm.clone()
    if max_norm is not None and not norm.isfinite():
        return norm
    clip = None if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    step_size, root = -lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    for bucket in _buckets(params):
        p, m, v = params[bucket], exp_avgs[bucket], exp_avg_sqs[bucket]
        g = [t.to(wide) for t in grads[bucket]]
        if clip is not None:
            g = list(torch._foreach_mul(g, clip))
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, root)
        torch._foreach_add_(denominator, eps)
        wide_p = [t.to(wide) for t in p]
        torch._foreach_mul_(wide_p, [1 - lr * decay for decay in weight_decay[bucket]])
        torch._foreach_addcdiv_(wide_p, m, denominator, step_size)
        if p[0].dtype != wide:
            torch._foreach_copy_(p, wide_p)
            wide_p = [t.to(wide) for t in p]
        if ema:
            torch._foreach_lerp_(ema[bucket], wide_p, 1 - (ema_decay or 0.0))
    return norm


def _norm(grads: list[Tensor], wide: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=wide)))
    return norm


def _forward_on_device(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    ema: list[Tensor], beta1: float, beta2: float, eps: float, weight_decay: Sequence[float], max_norm: float | None,
    schedule: Tensor, norm: Tensor | None,
) -> Tensor:  # fmt: skip
    """In PyTorch, tensor by tensor, without reading a value on the host: for captured steps where there is no kernel."""
    wide = exp_avgs[0].dtype
    step, lr, ema_decay = schedule.unbind()
    norm = _norm(grads, wide) if norm is None else norm.clone()
    finite = torch.ones_like(norm, dtype=torch.bool) if max_norm is None else norm.isfinite()
    clip = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    root, size = (1 - beta2**step).sqrt().to(wide), (-lr / (1 - beta1**step)).to(wide)
    keeps = {decay: (1 - lr * decay).to(wide) for decay in weight_decay}
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(wide) * clip
        first = m.lerp(g, 1 - beta1)
        second = (v * beta2).addcmul_(g, g, value=1 - beta2)
        stepped = (p.to(wide) * keeps[weight_decay[i]] + size * (first / (second.sqrt() / root + eps))).to(p.dtype)
        changed = [(p, stepped), (m, first), (v, second)]
        if ema:
            changed.append((ema[i], ema[i].lerp(stepped.to(wide), (1 - ema_decay).to(wide))))
        for old, new in changed:
            old.copy_(torch.where(finite, new, old))
    return norm


def _buckets(params: Sequence[Tensor]) -> list[slice]:
    """Consecutive slices of BUCKET elements or the first tensor beyond."""
    slices, start, elements = [], 0, 0
    for end, p in enumerate(params, 1):
        elements += p.numel()
        if elements >= BUCKET or end == len(params):
            slices.append(slice(start, end))
            start, elements = end, 0
    return slices


def _fake(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], *_: Any) -> Tensor:
    return params[0].new_empty((), dtype=exp_avgs[0].dtype)


_dispatch.register("adamw_ema_", "eager", _forward_eager)
_adamw_ema_ = _operator.define(
    "adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] ema, int step,"
    " float lr, float beta1, float beta2, float eps, float[] weight_decay, float? max_norm, float? ema_decay,"
    " Tensor? schedule, Tensor? norm) -> Tensor",
    fake=_fake,
)


# ---- the CPU kernels, csrc/cpu/adamw_ema.cpp

_STEP = cpu.Kernel(
    "adamw_ema",
    "T** params, void** grads, int64_t* wide_grads, float** exp_avgs, float** exp_avg_sqs, float** ema, int64_t* sizes, "
    "double* keep, int64_t tensors, double rest1, double beta2, double root, double eps, double size, double max_norm, "
    "double ema_rest, float* norm",
)


def _forward_cpu(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor], step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: Sequence[float],
    max_norm: float | None, ema_decay: float | None, schedule: Tensor | None, norm: Tensor | None,
) -> Tensor:  # fmt: skip
    changed = [params, exp_avgs, exp_avg_sqs, *([ema] if ema else [])]
    (*states, grads), copies = _flat_lists.flatten([*changed, grads], len(changed))
    given = norm
    # NaN asks the kernel for the norm; a given one that is NaN changes nothing, as an infinite one does.
    norm = torch.full((), math.nan) if given is None else given.nan_to_num(nan=math.inf, posinf=math.inf)
    _STEP(
        params[0].dtype, _addresses(states[0]), _addresses(grads), _numbers([g.dtype == torch.float32 for g in grads]),
        _addresses(states[1]), _addresses(states[2]), _addresses(states[3]) if ema else None,
        _numbers([p.numel() for p in params]), torch.tensor([1 - lr * decay for decay in weight_decay], dtype=torch.float64),
        len(params), 1 - beta1, float(beta2), math.sqrt(1 - beta2**step), float(eps), -lr / (1 - beta1**step),
        math.nan if max_norm is None else float(max_norm), 1.0 - (ema_decay or 0.0), norm,
    )  # fmt: skip
    for tensor, copy in copies:
        tensor.copy_(copy)
    torch.autograd.graph.increment_version([t for values in changed for t in values if not t.is_inference()])
    return norm if given is None else given.clone()


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return _numbers([t.data_ptr() for t in tensors])


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _unsupported_reason(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor], schedule: Tensor | None, norm: Tensor | None,
) -> str | None:  # fmt: skip
    if schedule is not None:
        return "it takes step, lr and ema_decay as numbers"
    states = *exp_avgs, *exp_avg_sqs, *ema
    return cpu.unsupported_reason(*params, *grads, *states) or _flat_lists.dtype_obstacle(params, grads, states)


cpu.register(
    "adamw_ema_",
    _forward_cpu,
    operands=("params", "grads", "exp_avgs", "exp_avg_sqs", "ema", "schedule", "norm"),
    unsupported_reason=_unsupported_reason,
)


# ---- how it is called


def _states(draw: Draw, *sizes: int) -> list[Tensor]:
    """params, grads, m, v, ema, one after the other."""
    params, grads, m, v, ema = ([draw(size) for size in sizes] for _ in range(5))
    return [*params, *grads, *m, *(value.abs() for value in v), *ema]


def _step(function: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    """The norm, and all that changes, of copies."""
    count = len(tensors) // 5
    lists = [[t.clone() for t in tensors[i * count : (i + 1) * count]] for i in range(5)]
    norm = function(*lists, step=3, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_norm=1.0, ema_decay=0.99)
    return [norm, *lists[0], *lists[2], *lists[3], *lists[4]]


CALLS = [
    Call(
        "adamw_ema_", adamw_ema_, reference, _states, apply=_step, least=(3,), tiny=(5, 1001, 64, 1), real=(768 * 3072, 768, 768 * 768, 1, 33),
        single=tuple(range(8, 25)), differentiable=False, refused={"cuda": (torch.float16,)},
    )
]  # fmt: skip
