"""mlp: the products next to the activation."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.config import Config
from ...mlp import _mlp_backward, _mlp_forward
from ..catalog import SIZES, Entry, Work, product_bytes, row_alignment, row_constants, row_types


def work(count: int, hidden: int, width: int, size: int, parameter_size: int, config: Config, backward: bool) -> Work:
    """One launch: both operands tile by tile, then h and a out; or h in, grad_h and a out, and a partial sum of db1 per row of tiles."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    operands = product_bytes(count, hidden, width, size, parameter_size, block_m, block_n)
    bias = cdiv(count, block_m) * hidden * (4 if backward else parameter_size)
    kept = (3 if backward else 2) * count * hidden * size
    return Work(
        2 * count * hidden * width,
        operands + bias + kept,
        programs=cdiv(count, block_m) * cdiv(hidden, block_n),
        distinct=count * width * size + hidden * width * parameter_size + bias + kept,
        trips=(cdiv(width, config.blocks["BLOCK_K"]),),
    )


def entries() -> list[Entry]:
    count, width, hidden = 16384, 768, 3072
    dimensions = {"rows": "i32", "hidden": "i32"}

    def entry_work(name: str, t: str, config: Config, mixed: bool) -> Work:
        return work(count, hidden, width, SIZES[t], 4 if mixed else SIZES[t], config, name == "mlp_backward")

    def forward_types(t: str, parameters: str) -> dict[str, str]:
        pointers = {"w1": f"*{parameters}", "w1_stride": "i32", "b1": f"*{parameters}", "h": f"*{t}", "a": f"*{t}"}
        return row_types("x", t) | pointers | dimensions | {"width": "i32"}

    def backward_types(t: str, parameters: str) -> dict[str, str]:
        operand = {"w2": f"*{parameters}", "w2_stride": "i32"}
        outputs = {"grad_h": f"*{t}", "a": f"*{t}", "b1_partials": "*fp32"}
        return row_types("grad_y", t) | operand | row_types("h", t) | outputs | dimensions | {"features": "i32"}

    kernels = (
        (_mlp_forward, "mlp_forward", forward_types, ("x",), ("w1_stride", "width")),
        (_mlp_backward, "mlp_backward", backward_types, ("grad_y", "h"), ("w2_stride", "features")),
    )
    return [
        Entry(
            kernel,
            "mlp",
            lambda t, types=types, mixed=mixed: types(t, "fp32" if mixed else t),
            f"{count} x {width} -> {hidden}",
            lambda t, config, name=name, mixed=mixed: entry_work(name, t, config, mixed),
            row_constants(*strided) | {"EXACT": exact},
            variant=("erf" if exact else "tanh") + (", float32 parameters" if mixed else ""),
            dtypes=("bf16", "fp16") if mixed else ("fp32", "bf16", "fp16"),
            aligned=(*row_alignment(*strided), "rows", "hidden", *divisible),
            matrix=True,
        )
        for kernel, name, types, strided, divisible in kernels
        for exact, mixed in ((True, False), (False, False), (True, True))
    ]
