"""rope: the forward with and without norms, and the backward with them (without, it is the forward, turning back)."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.reduce import strips_of
from ...rope import _rope_backward, _rope_forward
from ..catalog import SIZES, Entry, Work, row_alignment, row_constants, row_types

BATCH, TOKENS, HEADS, WIDTH = 32, 256, 16, 64
COUNT = BATCH * TOKENS * 3 * HEADS
"""Rows: heads of q, k and v."""
ANGLES = TOKENS * WIDTH * 4


def forward_work(normed: bool, t: str, config) -> Work:
    """Each row of q and k reads its token's angles from a cache."""
    moved, programs = 2 * COUNT * WIDTH * SIZES[t], cdiv(COUNT, config.blocks["BLOCK_ROWS"])
    again = 2 * COUNT // 3 * WIDTH * 4 + normed * programs * 2 * WIDTH * SIZES[t]
    return Work((9 if normed else 4) * COUNT * WIDTH, moved + again, programs, distinct=moved + ANGLES)


def backward_work(t: str, config) -> Work:
    strips = strips_of(COUNT)[0]
    moved = (2 + 2 / 3) * COUNT * WIDTH * SIZES[t] + strips * 2 * WIDTH * 4
    again = 2 * COUNT // 3 * WIDTH * 4 + strips * 2 * WIDTH * SIZES[t]
    return Work(18 * COUNT * WIDTH, moved + again, strips, distinct=moved + ANGLES)


def entries() -> list[Entry]:
    sizes = dict.fromkeys(("tokens", "heads", "width"), "i32")

    def tables(t: str, normed: bool) -> dict[str, str]:
        weights = {"q_weight": f"*{t}", "k_weight": f"*{t}"} if normed else {}
        return {"cos": "*fp32", "sin": "*fp32"} | weights

    def described(kernel, types, work, strided, variant="", **constants):
        return Entry(
            kernel, "rope", types, f"{BATCH} x {TOKENS} tokens, {HEADS} heads of {WIDTH}", work, row_constants(*strided) | constants,
            variant=variant, aligned=(*row_alignment(*strided), "rows", "tokens", "heads", "width", "rows_per_strip", "strips"), streaming=True,
        )  # fmt: skip

    forwards = [
        described(
            _rope_forward,
            lambda t, normed=normed: row_types("qkv", t) | tables(t, normed) | {"out": f"*{t}", "rows": "i32"} | sizes | {"eps": "fp32"},
            lambda t, config, normed=normed: forward_work(normed, t, config), ("qkv",), "with norms" if normed else "",
            SIGN=1, **({} if normed else {"q_weight": None, "k_weight": None}),
        )
        for normed in (False, True)
    ]  # fmt: skip
    backward = described(
        _rope_backward,
        lambda t: row_types("grad_y", t) | row_types("qkv", t) | tables(t, True) | {"grad_qkv": f"*{t}", "weight_partials": "*fp32"}
        | dict.fromkeys(("rows", "strips", "rows_per_strip"), "i32") | sizes | {"eps": "fp32"},
        backward_work, ("grad_y", "qkv"),
    )  # fmt: skip
    return [*forwards, backward]
