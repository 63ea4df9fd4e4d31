"""linear_cross_entropy: the kernel over rows of logits, in its modes; what is done to labels, losses and gradients in one launch each."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.config import Config
from ...linear_cross_entropy import cross_entropy_labels, cross_entropy_loss, cross_entropy_rows, cross_entropy_scale
from ..catalog import SIZES, Entry, Work, argument_types

OP = "linear_cross_entropy"
ROWS, CLASSES, WIDTH = 1360, 49408, 768
MODES = {
    "statistics": (1, ("upstream", "hidden", "copy")),
    "loss": (1, ("upstream", "lse", "hidden", "copy")),
    "gradient": (2, ("nll",)),
    "both": (3, ("lse",)),
    "both, for hidden alone": (3, ("lse", "hidden", "copy")),
}
"""Mode -> passes over the logits, and the arguments that are None."""


def of_one_program(kernel, problem: str, count: int, size: int, types: dict[str, str], **more) -> Entry:
    """A sum over `count` numbers."""

    def work(_: str, config: Config) -> Work:
        return Work(0, count * size + 8, 1, trips=(cdiv(count, config.blocks["BLOCK"]),))

    waits = {"wide": "one program, which waits for a few loads"}
    return Entry(
        kernel, OP, argument_types(kernel, **types), problem, work,
        dtypes=("fp32",), aligned=("tokens",), streaming=True, exceptions=waits, **more,
    )  # fmt: skip


def rows_entry(mode: str) -> Entry:
    passes, missing = MODES[mode]

    def work(dtype: str, _: Config) -> Work:
        copied = 0 if "copy" in missing else 2 * WIDTH * SIZES[dtype]
        distinct = min(passes, 2)  # both: the second time from cache
        moved, once = (ROWS * (CLASSES * times * SIZES[dtype] + 20 + copied) for times in (passes, distinct))
        return Work(0, moved, ROWS, once)

    types = (
        {"labels": "*i64"}
        | dict.fromkeys(("logits", "hidden", "copy"), "*{}")
        | dict.fromkeys(("upstream", "nll", "lse"), "*fp32")
    )
    return Entry(
        cross_entropy_rows,
        OP,
        argument_types(cross_entropy_rows, **types),
        f"{ROWS} x {CLASSES}",
        work,
        dict.fromkeys(missing),
        variant=mode,
        aligned=("logits_stride", "hidden_stride", "classes", "width"),
        streaming=True,
        exceptions={"wide": "beside two accesses of 16 bytes a turn stand the row's scalars"},
    )


def scale_entry() -> Entry:
    def work(dtype: str, config: Config) -> Work:
        blocks = sum(cdiv(count * WIDTH, config.blocks["BLOCK"]) for count in (ROWS, CLASSES))
        return Work(0, 2 * (ROWS + CLASSES) * WIDTH * SIZES[dtype] + 4, blocks)

    gradients = dict.fromkeys(("first", "scaled_first", "second", "scaled_second"), "*{}")
    return Entry(
        cross_entropy_scale,
        OP,
        argument_types(cross_entropy_scale, upstream="*fp32", **gradients),
        f"({ROWS} + {CLASSES}) x {WIDTH}",
        work,
        aligned=("first_count", "second_count"),
        streaming=True,
    )


def entries() -> list[Entry]:
    labels = {"labels": "*i64", "factor": "*fp32", "fine": "*i64"}
    sums = dict.fromkeys(("nll", "factor", "loss"), "*fp32")
    return [
        of_one_program(cross_entropy_labels, f"{ROWS} labels", ROWS, 8, labels, constexprs={"MEAN": True}),
        of_one_program(
            cross_entropy_labels,
            f"{ROWS} labels",
            ROWS,
            8,
            labels,
            constexprs={"MEAN": False, "factor": None},
            variant="no factor",
        ),
        of_one_program(cross_entropy_loss, f"{ROWS} rows", ROWS, 4, sums),
        scale_entry(),
        *map(rows_entry, MODES),
    ]
