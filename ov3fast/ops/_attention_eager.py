"""The eager backend of attention, and which keys a query sees."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check


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


def _scores(q_BHND: Tensor, k_BHND: Tensor, scale: float, causal: bool, prefix_len: int) -> tuple[Tensor, Tensor | None]:
    """Scaled scores with -inf where unseen, and where that is (None: nowhere)."""
    scores = (q_BHND * scale) @ k_BHND.transpose(-1, -2)
    visible = visible_keys(q_BHND.shape[2], k_BHND.shape[2], causal, prefix_len, q_BHND.device)
    if visible is None:
        return scores, None
    unseen = ~visible
    return scores.masked_fill_(unseen, -torch.inf), unseen


def _probabilities(scores: Tensor, unseen: Tensor | None, lse: Tensor) -> Tensor:
    """exp(scores - lse) in place of the scores; 0 also in rows whose lse is -inf."""
    probabilities = scores.sub_(lse[..., None]).exp_()
    return probabilities if unseen is None else probabilities.masked_fill_(unseen, 0.0)


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float) -> tuple[Tensor, ...]:
    # Unlike the reference it returns lse for the backward, and works on the scores in place: half the memory.
    wide = _check.accumulate_dtype(q.dtype)
    q_BHND, k_BHND, v_BHND = (t.transpose(1, 2).to(wide) for t in (q, k, v))
    scores, unseen = _scores(q_BHND, k_BHND, scale, causal, prefix_len)
    lse = torch.logsumexp(scores, -1)
    out = _probabilities(scores, unseen, lse) @ v_BHND
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix_len: int, scale: float
) -> tuple[Tensor, ...]:
    wide = _check.accumulate_dtype(q.dtype)
    grad_BHND, q_BHND, k_BHND, v_BHND = (t.transpose(1, 2).to(wide) for t in (grad_out, q, k, v))
    scores, unseen = _scores(q_BHND, k_BHND, scale, causal, prefix_len)
    p = _probabilities(scores, unseen, lse)
    grad_v = p.transpose(-1, -2) @ grad_BHND
    # The sum over j equals <grad_out_i, out_i>, which saves a pass; from p it is free of out's rounding.
    grad_p = grad_BHND @ v_BHND.transpose(-1, -2)
    grad_s = grad_p.sub_((grad_p * p).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    grads = (grad_s @ k_BHND, grad_s.transpose(-1, -2) @ q_BHND, grad_v)
    return tuple(grad.transpose(1, 2).to(q.dtype).contiguous() for grad in grads)
