"""Both GELUs in float32, and their derivatives.

EXACT: with the normal CDF, else with its tanh approximation. NARROW: for results that are rounded to 16 bits.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(h, EXACT: tl.constexpr, NARROW: tl.constexpr):
    """h Phi(h), or its tanh approximation."""
    if EXACT:
        phi, _ = _phi(h, NARROW)
        return h * phi
    else:
        return h / (1 + _odds(h))


@triton.jit
def gelu_and_slope(h, EXACT: tl.constexpr, NARROW: tl.constexpr):
    """(gelu(h), gelu'(h)): one evaluation of Phi serves both."""
    if EXACT:
        gate, bell = _phi(h, NARROW)
        slope = gate + h * 0.3989422804014327 * bell
    else:
        odds = _odds(h)
        gate = 1 / (1 + odds)
        # 1 - gate would cancel for large h; gate * odds is 0 * inf for very negative h.
        rest = tl.where(h < 0, 1 - gate, gate * odds)
        slope = gate + h * gate * rest * (1.5957691216057308 + 0.21406444881780076 * h * h)
    return h * gate, slope


@triton.jit
def _phi(h, NARROW: tl.constexpr):
    """Phi(h) and exp(-h^2 / 2).

    NARROW: Phi(-|h|) = exp(-h^2 / 2) P(|h|), with an error of at most 3e-6, in the tail 1e-8, and without erf's branches. P is fitted to
    exp(h^2 / 2) erfc(|h| / sqrt(2)) / 2 up to 5.5; beyond, its last value times the exponential goes to 0.
    """
    if NARROW:
        bell = tl.exp2(-0.7213475204444817 * h * h)
        x = tl.minimum(tl.abs(h), 5.5)
        tail = 7.652028580196202e-05 - 3.367600129422499e-06 * x
        tail = tail * x - 0.0007712646038271487
        tail = tail * x + 0.004610296338796616
        tail = tail * x - 0.018588952720165253
        tail = tail * x + 0.055113162845373154
        tail = tail * x - 0.12880486249923706
        tail = tail * x + 0.2487383484840393
        tail = tail * x - 0.39878708124160767
        tail = (tail * x + 0.4999966621398926) * bell
        return tl.where(h < 0, tail, 1 - tail), bell
    else:
        return 0.5 + 0.5 * tl.erf(h * 0.7071067811865476), tl.exp(-0.5 * h * h)


@triton.jit
def _odds(h):
    """exp(-2 u): (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), and this form does not cancel far from 0."""
    return tl.exp(-1.5957691216057308 * (h + 0.044715 * h * h * h))
