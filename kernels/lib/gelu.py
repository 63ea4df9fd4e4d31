"""The two GELUs in float32, and their slopes."""

import triton
import triton.language as tl


@triton.jit
def gelu(h, EXACT: tl.constexpr):
    """h Phi(h), or with its tanh approximation."""
    if EXACT:
        return h * _phi(h)
    else:
        return h / (1 + _odds(h))


@triton.jit
def gelu_and_slope(h, EXACT: tl.constexpr):
    """(gelu(h), gelu'(h)): one evaluation of Phi serves both."""
    if EXACT:
        gate = _phi(h)
        slope = gate + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        odds = _odds(h)
        gate = 1 / (1 + odds)
        # 1 - gate would cancel for large h, gate * odds is 0 * inf for small.
        rest = tl.where(h < 0, 1 - gate, gate * odds)
        slope = gate + h * gate * rest * (1.5957691216057308 + 0.21406444881780076 * h * h)
    return h * gate, slope


@triton.jit
def _phi(h):
    return 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)


@triton.jit
def _odds(h):
    """exp(-2 u): (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), and this form does not cancel far from 0."""
    return tl.exp(-1.5957691216057308 * (h + 0.044715 * h * h * h))
