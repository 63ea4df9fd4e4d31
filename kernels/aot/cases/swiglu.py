"""swiglu: both kernels."""

from __future__ import annotations

from ...lib.common import cdiv
from ...swiglu import _swiglu_backward, _swiglu_forward
from ..catalog import SIZES, Entry, Work, row_alignment, row_constants, row_types

COUNT, HIDDEN = 16384, 3072


def work(moved: int, flops: int, t: str, config) -> Work:
    """moved: numbers read or written per element of y."""
    programs = cdiv(COUNT, config.blocks["BLOCK_ROWS"]) * cdiv(HIDDEN, config.blocks["BLOCK_H"])
    return Work(flops * COUNT * HIDDEN, moved * COUNT * HIDDEN * SIZES[t], programs)


def entries() -> list[Entry]:
    sizes = {"rows": "i32", "hidden": "i32"}
    return [
        Entry(
            kernel, "swiglu", types, f"{COUNT} x 2 x {HIDDEN}",
            lambda t, config, moved=moved, flops=flops: work(moved, flops, t, config), row_constants(*strided),
            aligned=(*row_alignment(*strided), "rows", "hidden"), streaming=True,
        )
        for kernel, types, moved, flops, strided in (
            (_swiglu_forward, lambda t: row_types("x", t) | {"y": f"*{t}"} | sizes, 3, 5, ("x",)),
            (
                _swiglu_backward, lambda t: row_types("grad_y", t) | row_types("x", t) | {"grad_x": f"*{t}"} | sizes, 5, 10,
                ("grad_y", "x"),
            ),
        )
    ]  # fmt: skip
