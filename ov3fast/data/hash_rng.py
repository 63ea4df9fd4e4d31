"""Counter-based randomness for data: every draw is a pure function of (seed, stream, counters).

The order of samples, their crops, backgrounds and captions are functions of the seed and of the sample's numbers,
never of a generator's state, so any step can be computed without the steps before it, whatever the number of workers
or ranks. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
2014), chained over the counters. It uses numpy alone and is separate from `ops.random`, the model's noise.
"""

from __future__ import annotations

import numpy as np

# Streams: independent uses of the same seed and counters.
ORDER, MEMBER, CAPTION, CROP, FLIP, BACKGROUND, SUBSTITUTE, SPLIT = range(8)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(seed: int, stream: int, *counters: np.ndarray | int) -> np.ndarray:
    """uint64 hash of the seed, the stream and the counters (non-negative integers, broadcast against each other)."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed % 2**64, np.uint64) + _GOLDEN)
        for counter in (stream, *counters):
            state = _mix((state ^ np.asarray(counter).astype(np.uint64)) * _GOLDEN + _GOLDEN)
    return state


def uniform(seed: int, stream: int, *counters: np.ndarray | int) -> np.ndarray:
    """float64 in [0, 1) from the top 53 bits of `bits`."""
    return (bits(seed, stream, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, seed: int, stream: int, *counters: int) -> np.ndarray:
    """A random order of range(n), int64 [n], for small n (sorts n hashes)."""
    return np.argsort(bits(seed, stream, *counters, np.arange(n)), kind="stable")
