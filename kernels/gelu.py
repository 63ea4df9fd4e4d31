"""The two GELUs in float32, and their slopes."""

import triton
import triton.language as tl


@triton.jit
def gelu(h, EXACT: tl.constexpr):
    """h Phi(h), or with its tanh approximation."""
    return h * _gate(h, EXACT)


@triton.jit
def gelu_and_slope(h, EXACT: tl.constexpr):
    """(gelu(h), gelu'(h)): one evaluation of Phi serves both."""
    gate = _gate(h, EXACT)
    if EXACT:
        slope = gate + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        slope = gate + h * gate * (1 - gate) * (1.5957691216057308 + 0.21406444881780076 * h * h)
    return h * gate, slope


@triton.jit
def _gate(h, EXACT: tl.constexpr):
    if EXACT:
        return 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), and this form does not cancel far from 0.
        return 1 / (1 + tl.exp(-1.5957691216057308 * (h + 0.044715 * h * h * h)))
