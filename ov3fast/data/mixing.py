"""How many samples of each source a stream holds: exact for every beginning of it, computed without walking it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def weights(fractions: Sequence[float]) -> list[int]:
    """The fractions, as they are written in decimal, as whole numbers in the same ratio."""
    exact = [Fraction(str(fraction)) for fraction in fractions]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    common = math.gcd(*whole)
    return [weight // common for weight in whole]


def drawn(count: int, weight: Sequence[int]) -> list[int]:
    """How many of the first `count` samples of the stream come from each source; they add up to `count`.

    Each is within one sample of its share, and grows by 0 or 1 with every further sample: the first source takes its share of all,
    rounded, the next one its share of what is left, and so on.
    """
    counts, left, rest = [], count, sum(weight)
    for own in weight[:-1]:
        counts.append((2 * left * own + rest) // (2 * rest))
        left, rest = left - counts[-1], rest - own
    return [*counts, left]
