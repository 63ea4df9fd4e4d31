"""Sums over rows, and partial products of a split axis."""

from __future__ import annotations

from ...lib.sums import STRIPS, column_sums, merge_splits
from ..catalog import SIZES, Entry, Work, argument_types


def entries() -> list[Entry]:
    batch, tokens, width, splits, n = 64, 256, 768, 8, 768 * 768
    sizes = "64 x 256 x 768"
    return [
        Entry(
            column_sums, "sums", argument_types(column_sums, x="*{}", out="*fp32"), sizes,
            lambda dtype: Work(batch * tokens * width, batch * tokens * width * SIZES[dtype] + STRIPS * width * 4),
            aligned=("stride_b", "stride_n", "width", "tokens", "rows", "strip_rows", "strip_step"), streaming=True,
        ),
        Entry(
            merge_splits, "sums", argument_types(merge_splits, partials="*fp32", out="*{}"), f"{splits} x {n}",
            lambda dtype: Work(splits * n, splits * n * 4 + n * SIZES[dtype]), aligned=("n",), streaming=True,
        ),
    ]  # fmt: skip
