"""linear: the tiled product, with the weight transposed and not."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.config import Config
from ...linear import _linear
from ..catalog import SIZES, Entry, Work, product_bytes, row_alignment, row_constants, row_types


def work(count: int, columns: int, depth: int, size: int, parameter_size: int, config: Config) -> Work:
    """One launch with a bias: loads both operands per tile and the bias once per row of tiles, stores y."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    operands = product_bytes(count, columns, depth, size, parameter_size, block_m, block_n)
    tiles = cdiv(count, block_m) * cdiv(columns, block_n)
    return Work(
        2 * count * columns * depth,
        operands + cdiv(count, block_m) * columns * parameter_size + count * columns * size,
        programs=tiles,
        distinct=(count * depth + count * columns) * size + columns * (depth + 1) * parameter_size,
        trips=(cdiv(depth, config.blocks["BLOCK_K"]),),
    )


def entries() -> list[Entry]:
    count, columns, depth = 1024, 768, 3072

    def entry_work(t: str, config: Config, mixed: bool) -> Work:
        return work(count, columns, depth, SIZES[t], 4 if mixed else SIZES[t], config)

    def types(t: str, parameters: str) -> dict[str, str]:
        pointers = {"weight": f"*{parameters}", "weight_stride": "i32", "bias": f"*{parameters}", "y": f"*{t}"}
        return row_types("x", t) | pointers | {"rows": "i32", "columns": "i32", "depth": "i32"}

    return [
        Entry(
            _linear,
            "linear",
            lambda t, mixed=mixed: types(t, "fp32" if mixed else t),
            f"{count} x {depth} -> {columns}",
            lambda t, config, mixed=mixed: entry_work(t, config, mixed),
            row_constants("x") | {"TRANSPOSED": transposed},
            variant=("x W^T" if transposed else "dy W") + (", float32 parameters" if mixed else ""),
            dtypes=("bf16", "fp16") if mixed else ("fp32", "bf16", "fp16"),
            aligned=(*row_alignment("x"), "weight_stride", "rows", "columns", "depth"),
            matrix=True,
        )
        for transposed in (True, False)
        for mixed in (False, True)
    ]
