"""Sums over the rows of a matrix, and over the splits of a product."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.config import Config
from ...lib.reduce import _column_merge, _column_partials, merge_splits, strips_of
from ..catalog import SIZES, Entry, Work, row_alignment, row_constants, row_types


def entries() -> list[Entry]:
    count, width = 16384, 768
    strips, _ = strips_of(count)
    splits, n = 8, 768 * 768
    return [
        Entry(
            _column_partials,
            "reduce",
            lambda t: row_types("x", t) | {"partials": "*fp32", "rows": "i32", "width": "i32", "rows_per_strip": "i32"},
            f"{count} x {width}",
            lambda t, config: partials_work(count, width, SIZES[t], config),
            row_constants("x"),
            aligned=(*row_alignment("x"), "rows", "width", "rows_per_strip"),
            streaming=True,
        ),
        Entry(
            _column_merge,
            "reduce",
            lambda t: {"partials": "*fp32", "first": f"*{t}", "second": f"*{t}", "parts": "i32", "width": "i32"},
            f"2 x {strips} x {width}",
            lambda t, config: merge_work(2, strips, width, SIZES[t], config),
            aligned=("parts", "width"),
            streaming=True,
        ),
        Entry(
            merge_splits,
            "reduce",
            lambda t: {"partials": "*fp32", "out": f"*{t}", "n": "i32", "splits": "i32"},
            f"{splits} x {n}",
            lambda t, config: Work(splits * n, splits * n * 4 + n * SIZES[t], cdiv(n, config.blocks["BLOCK"])),
            aligned=("n",),
            streaming=True,
        ),
    ]


def partials_work(count: int, width: int, size: int, config: Config) -> Work:
    strips = strips_of(count)[0]
    programs = strips * cdiv(width, config.blocks["BLOCK_COLUMNS"])
    return Work(count * width, count * width * size + strips * width * 4, programs)


def merge_work(results: int, parts: int, width: int, size: int, config: Config) -> Work:
    programs = results * cdiv(width, config.blocks["BLOCK_COLUMNS"])
    return Work(results * parts * width, results * width * (parts * 4 + size), programs)
