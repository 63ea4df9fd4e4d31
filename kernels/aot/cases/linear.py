"""linear: the tiled product, with the weight transposed and not; the gradients of a small call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...lib.common import cdiv
from ...lib.config import Config
from ...linear import _linear, _linear_gradients
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


def gradients_work(count: int, layers: list[tuple[int, int, bool]], size: int, parameter_size: int, config: Config) -> Work:
    """One launch of the tiles of dx, dW and db of some layers of `count` rows: (width, features, whether x gets a gradient) of each.

    Loads both operands per tile, and once more those that are summed for a bias.
    """
    m, n, k = (config.blocks[f"BLOCK_{axis}"] for axis in "MNK")
    products = [((features, width, count), size) for width, features, _ in layers]
    products += [((count, width, features), parameter_size) for width, features, of_x in layers if of_x]
    tiles = sum(cdiv(rows, m) * cdiv(columns, n) for (rows, columns, _), _ in products)
    written = sum(of_x * count * width * size + features * (width + 1) * parameter_size for width, features, of_x in layers)
    read = sum(count * (width + features) * size + of_x * width * features * parameter_size for width, features, of_x in layers)
    operands = sum(product_bytes(*product, size, other, m, n) for product, other in products)
    return Work(
        sum(2 * rows * columns * depth for (rows, columns, depth), _ in products),
        operands + count * sum(features for _, features, _ in layers) * size + written,
        programs=tiles,
        distinct=read + written,
        # Only a bias's programs sum: the average over all.
        trips=(cdiv(count, k) * sum(cdiv(features, m) for _, features, _ in layers) / tiles,),
    )


def gradient_entries(
    kernel: Any, op: str, problem: str, count: int, layers: list[tuple[int, int, bool]],
    types: Callable[[str, str], dict[str, str]], aligned: tuple[str, ...],
) -> list[Entry]:  # fmt: skip
    """A kernel of such tiles, with parameters of the operands' dtype and in float32. types: both dtypes -> those of its arguments."""
    return [
        Entry(
            kernel,
            op,
            lambda t, mixed=mixed: types(t, "fp32" if mixed else t),
            problem,
            lambda t, config, mixed=mixed: gradients_work(count, layers, SIZES[t], 4 if mixed else SIZES[t], config),
            row_constants("grad_y", "x"),
            variant="float32 parameters" if mixed else "",
            dtypes=("bf16", "fp16") if mixed else ("fp32", "bf16", "fp16"),
            aligned=(*row_alignment("grad_y", "x"), *aligned),
            matrix=True,
        )
        for mixed in (False, True)
    ]


def gradients() -> list[Entry]:
    count, features, width = 1024, 768, 768
    sizes = ("rows", "features", "width")

    def types(t: str, parameters: str) -> dict[str, str]:
        operands = row_types("grad_y", t) | row_types("x", t) | {"weight": f"*{parameters}", "weight_stride": "i32"}
        outputs = {"grad_x": f"*{t}", "grad_weight": f"*{parameters}", "grad_bias": f"*{parameters}"}
        return operands | outputs | dict.fromkeys(sizes, "i32")

    layers, problem = [(width, features, True)], f"{count} x {width} -> {features}"
    return gradient_entries(_linear_gradients, "linear", problem, count, layers, types, ("weight_stride", *sizes))


def entries() -> list[Entry]:
    count, columns, depth = 1024, 768, 3072

    def entry_work(t: str, config: Config, mixed: bool) -> Work:
        return work(count, columns, depth, SIZES[t], 4 if mixed else SIZES[t], config)

    def types(t: str, parameters: str) -> dict[str, str]:
        pointers = {"weight": f"*{parameters}", "weight_stride": "i32", "bias": f"*{parameters}", "y": f"*{t}"}
        return row_types("x", t) | pointers | {"rows": "i32", "columns": "i32", "depth": "i32"}

    return gradients() + [
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
