"""Lays out adamw_ema_'s lists for csrc/cpu/adamw_ema.cpp."""

import math

import torch

from .. import _dispatch, _flat_lists
from . import missing, refuses, run


def _forward(params, grads, exp_avgs, exp_avg_sqs, ema, step, lr, beta1, beta2, eps, weight_decay, max_norm, ema_decay):
    changed = [params, exp_avgs, exp_avg_sqs, *([ema] if ema else [])]
    (*states, grads), copies = _flat_lists.flatten([*changed, grads], len(changed))
    norm = torch.empty((), dtype=torch.float32)
    run(
        "adamw_ema", params[0].dtype, _addresses(states[0]), _addresses(grads), _numbers(g.dtype == torch.float32 for g in grads),
        _addresses(states[1]), _addresses(states[2]), _addresses(states[3]) if ema else None,
        _numbers(p.numel() for p in params), torch.tensor([1 - lr * decay for decay in weight_decay], dtype=torch.float64),
        len(params), 1 - beta1, float(beta2), math.sqrt(1 - beta2**step), float(eps), -lr / (1 - beta1**step),
        math.nan if max_norm is None else float(max_norm), 1.0 - (ema_decay or 0.0), norm,
    )  # fmt: skip
    for tensor, copy in copies:
        tensor.copy_(copy)
    torch.autograd.graph.increment_version([t for values in changed for t in values if not t.is_inference()])
    return norm


def _addresses(tensors):
    return _numbers(t.data_ptr() for t in tensors)


def _numbers(values):
    return torch.tensor(list(values), dtype=torch.int64)


def _refuses(params, grads, exp_avgs, exp_avg_sqs, ema, *_):
    states = *exp_avgs, *exp_avg_sqs, *ema
    return refuses(*params, *grads, *states) or _flat_lists.dtype_obstacle(params, grads, states)


_dispatch.register("adamw_ema_", "cpu", _forward, missing=missing, refuses=_refuses)
