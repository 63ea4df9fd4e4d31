"""Lays out adamw_ema_'s lists for csrc/cpu/adamw_ema.cpp."""

import math

import torch

from .. import _dispatch, _flat_lists
from . import Kernel, unavailable_reason, unsupported_reason

STEP = Kernel(
    "adamw_ema",
    "T** params, void** grads, int64_t* wide_grads, float** exp_avgs, float** exp_avg_sqs, float** ema, int64_t* sizes, "
    "double* keep, int64_t tensors, double rest1, double beta2, double root, double eps, double size, double max_norm, "
    "double ema_rest, float* norm",
)


def _forward(
    params, grads, exp_avgs, exp_avg_sqs, ema, step, lr, beta1, beta2, eps, weight_decay, max_norm, ema_decay, schedule
):
    changed = [params, exp_avgs, exp_avg_sqs, *([ema] if ema else [])]
    (*states, grads), copies = _flat_lists.flatten([*changed, grads], len(changed))
    norm = torch.empty((), dtype=torch.float32)
    STEP(
        params[0].dtype, _addresses(states[0]), _addresses(grads), _numbers([g.dtype == torch.float32 for g in grads]),
        _addresses(states[1]), _addresses(states[2]), _addresses(states[3]) if ema else None,
        _numbers([p.numel() for p in params]), torch.tensor([1 - lr * decay for decay in weight_decay], dtype=torch.float64),
        len(params), 1 - beta1, float(beta2), math.sqrt(1 - beta2**step), float(eps), -lr / (1 - beta1**step),
        math.nan if max_norm is None else float(max_norm), 1.0 - (ema_decay or 0.0), norm,
    )  # fmt: skip
    for tensor, copy in copies:
        tensor.copy_(copy)
    torch.autograd.graph.increment_version([t for values in changed for t in values if not t.is_inference()])
    return norm


def _addresses(tensors):
    return _numbers([t.data_ptr() for t in tensors])


def _numbers(values):
    return torch.tensor(values, dtype=torch.int64)


def _unsupported_reason(params, grads, exp_avgs, exp_avg_sqs, ema, schedule):
    if schedule is not None:
        return "it takes step, lr and ema_decay as numbers"
    states = *exp_avgs, *exp_avg_sqs, *ema
    return unsupported_reason(*params, *grads, *states) or _flat_lists.dtype_obstacle(params, grads, states)


_dispatch.register(
    "adamw_ema_", "cpu", _forward, operands=("params", "grads", "exp_avgs", "exp_avg_sqs", "ema", "schedule"),
    unavailable_reason=unavailable_reason, unsupported_reason=_unsupported_reason,
)  # fmt: skip
