"""mlp: the products fused with the activation, and the gradients of a small call."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.config import Config
from ...mlp import _mlp_backward, _mlp_forward, _mlp_gradients
from ..catalog import SIZES, Entry, Work, product_bytes, row_alignment, row_constants, row_types
from .linear import gradient_entries


def work(
    count: int, hidden: int, width: int, size: int, parameter_size: int, config: Config, backward: bool, keep: bool = True
) -> Work:
    """One launch. Loads both operands per tile; the forward stores h (if kept) and a, the backward loads h and stores grad_h, a, and a partial sum of
    db1 per row of tiles."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    operands = product_bytes(count, hidden, width, size, parameter_size, block_m, block_n)
    bias = cdiv(count, block_m) * hidden * (4 if backward else parameter_size)
    kept = (3 if backward else 1 + keep) * count * hidden * size
    return Work(
        2 * count * hidden * width,
        operands + bias + kept,
        programs=cdiv(count, block_m) * cdiv(hidden, block_n),
        distinct=count * width * size + hidden * width * parameter_size + bias + kept,
        trips=(cdiv(width, config.blocks["BLOCK_K"]),),
    )


def gradients() -> list[Entry]:
    count, width, hidden = 512, 384, 1536
    layers = [(width, hidden, True), (hidden, width, False)]
    sizes = ("rows", "width", "hidden", "features")

    def types(t: str, parameters: str) -> dict[str, str]:
        operands = {"grad_h": f"*{t}", "a": f"*{t}"} | row_types("grad_y", t) | row_types("x", t)
        weight = {"w1": f"*{parameters}", "w1_stride": "i32"}
        outputs = {"grad_x": f"*{t}"} | {f"grad_{name}": f"*{parameters}" for name in ("w1", "b1", "w2", "b2")}
        return operands | weight | outputs | dict.fromkeys(sizes, "i32")

    return gradient_entries(
        _mlp_gradients, "mlp", f"{count} x {width} -> {hidden}", count, layers, types, ("w1_stride", *sizes)
    )


def entries() -> list[Entry]:
    count, width, hidden = 16384, 768, 3072
    dimensions = {"rows": "i32", "hidden": "i32"}

    def entry_work(name: str, t: str, config: Config, mixed: bool, keep: bool) -> Work:
        return work(count, hidden, width, SIZES[t], 4 if mixed else SIZES[t], config, name == "mlp_backward", keep)

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
    return gradients() + [
        Entry(
            kernel,
            "mlp",
            lambda t, types=types, mixed=mixed, keep=keep: {
                argument: kind for argument, kind in types(t, "fp32" if mixed else t).items() if keep or argument != "h"
            },
            f"{count} x {width} -> {hidden}",
            lambda t, config, name=name, mixed=mixed, keep=keep: entry_work(name, t, config, mixed, keep),
            row_constants(*strided) | {"EXACT": exact} | ({} if keep else {"h": None}),
            variant=("erf" if exact else "tanh") + (", float32 parameters" if mixed else "") + ("" if keep else ", inference"),
            dtypes=("bf16", "fp16") if mixed else ("fp32", "bf16", "fp16"),
            aligned=(*row_alignment(*strided), "rows", "hidden", *divisible),
            matrix=True,
        )
        for kernel, name, types, strided, divisible in kernels
        for exact, mixed, keep in ((True, False, True), (True, False, False), (False, False, True), (True, True, True))
        if keep or kernel is _mlp_forward
    ]
