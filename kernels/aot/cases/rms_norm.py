"""rms_norm: both kernels, with and without a residual."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.reduce import strips_of
from ...rms_norm import _rms_norm_backward, _rms_norm_forward
from ..catalog import SIZES, Entry, Work, row_alignment, row_constants, row_types


def forward_work(count: int, width: int, size: int, residual: bool, programs: int) -> Work:
    """Each program reads the weight, of the storage's size, again."""
    moved = count * width * size * (4 if residual else 2)
    return Work(5 * count * width, moved + programs * width * size, programs, distinct=moved + width * size)


def backward_work(count: int, width: int, size: int, residual: bool, strips: int) -> Work:
    moved = count * width * size * (4 if residual else 3) + strips * width * (size + 4)
    return Work(12 * count * width, moved, programs=strips)


def entries() -> list[Entry]:
    count, width = 16384, 1152
    sizes = {"rows": "i32", "width": "i32"}
    kernels = {
        _rms_norm_forward: (
            lambda t: row_types("x", t) | row_types("residual", t)
            | {name: f"*{t}" for name in ("weight", "y", "h")} | sizes | {"eps": "fp32"},
            ("residual", "h"), lambda size, fused, config: forward_work(count, width, size, fused, cdiv(count, config.blocks["BLOCK_ROWS"])), ("x", "residual"),
        ),
        _rms_norm_backward: (
            lambda t: row_types("grad_y", t) | row_types("grad_h", t) | row_types("h", t)
            | {"weight": f"*{t}", "grad_x": f"*{t}", "weight_partials": "*fp32"} | sizes | {"rows_per_strip": "i32", "eps": "fp32"},
            ("grad_h",), lambda size, fused, config: backward_work(count, width, size, fused, strips_of(count)[0]), ("grad_y", "grad_h", "h"),
        ),
    }  # fmt: skip
    return [
        Entry(
            kernel,
            "rms_norm",
            lambda t, types=types, absent=() if fused else optional: {
                n: kind for n, kind in types(t).items() if n not in absent
            },
            f"{count} x {width}",
            lambda t, config, work=work, fused=fused: work(SIZES[t], fused, config),
            row_constants(*strided) | ({} if fused else dict.fromkeys(optional)),
            variant="with a residual" if fused else "",
            aligned=(*row_alignment(*strided), "rows", "width", "rows_per_strip"),
            streaming=True,
        )
        for kernel, (types, optional, work, strided) in kernels.items()
        for fused in (False, True)
    ]
