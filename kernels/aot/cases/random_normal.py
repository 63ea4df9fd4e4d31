"""random_normal: the normals, and the raw words that the tests compare."""

from __future__ import annotations

from ...lib.common import cdiv
from ...random_normal import random_normal, random_words
from ..catalog import SIZES, Entry, Work

# Integer and float instructions per block of four: ten rounds, two logarithms, two sine/cosine pairs.
FLOPS_OF_FOUR = 180


def entries() -> list[Entry]:
    n = 1 << 24
    return [
        Entry(
            random_normal,
            "random_normal",
            lambda dtype: {"rng": "*i64", "out": f"*{dtype}", "n": "i32"},
            f"{n}",
            lambda dtype, config: Work(n / 4 * FLOPS_OF_FOUR, n * SIZES[dtype] + 16, cdiv(n, config.blocks["BLOCK"])),
            aligned=("n",),
            streaming=True,
            exceptions={"wide": "one store a thread; the two 8-byte loads of (seed, offset) stand beside it"},
        ),
        Entry(
            random_words,
            "random_normal",
            lambda dtype: {"rng": "*i64", "out": "*i32", "n": "i32"},
            f"{n}",
            lambda dtype, config: Work(n / 4 * 60, n * 4 + 16, cdiv(n, config.blocks["BLOCK"])),
            dtypes=("fp32",),
            aligned=("n",),
        ),
    ]
