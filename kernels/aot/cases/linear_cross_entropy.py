"""linear_cross_entropy: the kernel over rows of logits, in its three modes."""

from __future__ import annotations

from ...lib.common import cdiv
from ...linear_cross_entropy import cross_entropy_labels, cross_entropy_rows
from ..catalog import SIZES, Entry, Work


def entries() -> list[Entry]:
    rows, classes = 1360, 49408
    modes = {"statistics": (True, False, 1), "gradient": (False, True, 2), "both": (True, True, 3)}

    def arguments(dtype):
        pointers = {"logits": f"*{dtype}", "labels": "*i64", "upstream": "*fp32", "nll": "*fp32", "lse": "*fp32"}
        sizes = ("logits_stride", "upstream_stride", "tokens", "classes", "ignore_index")
        return pointers | dict.fromkeys(sizes, "i32")

    def work(passes):
        distinct = min(passes, 2)  # both: the second time from cache
        return lambda dtype, _: Work(
            0, rows * (classes * passes * SIZES[dtype] + 20), rows, rows * (classes * distinct * SIZES[dtype] + 20)
        )

    labels = Entry(
        kernel=cross_entropy_labels,
        op="linear_cross_entropy",
        arguments=lambda _: (
            {"labels": "*i64", "factor": "*fp32", "fine": "*i8"} | dict.fromkeys(("tokens", "classes", "ignore_index"), "i32")
        ),
        problem=f"{rows} labels",
        work=lambda _, config: Work(0, rows * 8 + 5, 1, trips=(cdiv(rows, config.blocks["BLOCK"]),)),
        constexprs={"MEAN": True},
        dtypes=("fp32",),
        aligned=("tokens",),
        streaming=True,
        exceptions={"wide": "one program, which waits for a few loads"},
    )
    return [labels] + [
        Entry(
            kernel=cross_entropy_rows,
            op="linear_cross_entropy",
            arguments=arguments,
            problem=f"{rows} x {classes}",
            work=work(passes),
            constexprs={"STATISTICS": statistics, "GRADIENT": gradient},
            variant=name,
            aligned=("logits_stride", "classes"),
            streaming=True,
            exceptions={"wide": "beside two accesses of 16 bytes a turn stand the row's scalars"},
        )
        for name, (statistics, gradient, passes) in modes.items()
    ]
