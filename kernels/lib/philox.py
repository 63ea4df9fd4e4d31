"""Random numbers in Triton: Philox4x32-10 words and Box-Muller normals, exactly as defined in ov3fast/ops/random.py.

Element i is word i % 4 of counter offset + i // 4. Positions are int64 tensors of any shape and wrap modulo 2^64.
"""

from __future__ import annotations

import triton
import triton.language as tl

MULTIPLIER_A: tl.constexpr = tl.constexpr(0xD2511F53)
MULTIPLIER_B: tl.constexpr = tl.constexpr(0xCD9E8D57)
KEY_STEP_0: tl.constexpr = tl.constexpr(0x9E3779B9)
KEY_STEP_1: tl.constexpr = tl.constexpr(0xBB67AE85)
LOW: tl.constexpr = tl.constexpr(0xFFFFFFFF)


@triton.jit
def words(seed, position):
    """The four words (uint32, of position's shape) of the counters `position`; seed is an int64 scalar."""
    # 32 x 32 -> 64-bit products: one instruction gives both halves. Words stay uint64 between rounds; only their low halves matter.
    c0, c1 = position.to(tl.uint64), (position >> 32).to(tl.uint64) & LOW
    c2 = c0 * 0
    c3 = c2
    k0, k1 = seed.to(tl.uint64) & LOW, (seed >> 32).to(tl.uint64) & LOW
    for _ in tl.static_range(10):
        a, b = (c0 & LOW) * MULTIPLIER_A, (c2 & LOW) * MULTIPLIER_B
        c0, c2 = (b >> 32) ^ c1 ^ k0, (a >> 32) ^ c3 ^ k1
        c1, c3 = b, a
        k0, k1 = (k0 + KEY_STEP_0) & LOW, (k1 + KEY_STEP_1) & LOW
    return c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)


@triton.jit
def uniform(word):
    """[0, 1) in float32."""
    signed = word.to(tl.int32, bitcast=True)
    return (signed ^ (signed >> 31)).to(tl.float32) * 4.6566127342e-10


@triton.jit
def sin_cos(x):
    """sin and cos for 0 <= x <= 2 pi, to about one ulp of 1.

    Instead of tl.sin and tl.cos: libdevice's argument reduction uses local memory, and the fast approximation is off by 5e-7.
    """
    n = tl.floor(x * 0.636619772367581 + 0.5)
    quarter = n.to(tl.int32)
    r = ((x - n * 1.5703125) - n * 4.83751296997e-4) - n * 7.54978995489e-8
    square = r * r
    s = r + r * square * ((-1.948874536e-04 * square + 8.331923956e-03) * square - 1.666664969e-01)
    tail = (2.443120314e-05 * square - 1.388730602e-03) * square + 4.166664565e-02
    c = square * square * tail + (1.0 - 0.5 * square)
    swapped = (quarter & 1) != 0
    sine, cosine = tl.where(swapped, c, s), tl.where(swapped, s, c)
    return tl.where((quarter & 2) != 0, -sine, sine), tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def box_muller(first, second):
    """Two float32 normals from two words."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(uniform(first), 1e-7)))
    sine, cosine = sin_cos(uniform(second) * 6.283185307179586)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, position):
    """The four normals (float32, of position's shape) of the counters `position`."""
    w0, w1, w2, w3 = words(seed, position)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def normals_in_order(seed, position):
    """Normals of full blocks, each computed once: positions [M, K / 4] -> [M, K] float32."""
    n0, n1, n2, n3 = normals(seed, position)
    quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return quads.reshape((position.shape[0], position.shape[1] * 4))


@triton.jit
def normal_at(seed, offset, element):
    """Normals of arbitrary elements (int64 tensor), computing an entire block for each; for tiles not aligned to blocks."""
    w0, w1, w2, w3 = words(seed, (element >> 2) + offset)
    upper = (element & 2) != 0
    cosine, sine = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, sine, cosine)
