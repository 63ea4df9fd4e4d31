"""noise_projection: a launch of each kernel."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.config import pick
from ...lib.reduce import splits_of
from ...noise_projection import (
    noise_projection_forward,
    noise_projection_grad_sigma,
    noise_projection_grad_weight,
    noise_projection_grad_z,
)
from ..catalog import SIZES, Entry, Work, argument_types

POINTERS = {
    **dict.fromkeys(("z", "sigma", "weight", "bias", "y", "grad_y", "grad_z", "grad_sigma"), "*{}"),
    **dict.fromkeys(("sigma_partials", "partials"), "*fp32"),
    "rng": "*i64",
}
ALIGNED = (
    "stride_b",
    "stride_n",
    "grad_stride_b",
    "grad_stride_n",
    "weight_stride",
    "width",
    "features",
    "rows",
    "tokens",
    "split_rows",
)


def product_work(rows, left, right, dtype, config, extra=0):
    """A product [rows, left] x [left, right] in tiles: each factor is read once per tile of the other's outer axis."""
    blocks = config.blocks
    m, n = cdiv(rows, blocks["BLOCK_M"]), cdiv(right, blocks["BLOCK_N"])
    moved = (n * rows * left + m * left * right + rows * right) * SIZES[dtype]
    distinct = (rows * left + left * right + rows * right) * SIZES[dtype]
    trips = (cdiv(left, blocks["BLOCK_K"]),)
    return Work(2 * rows * left * right, moved + extra, m * n, distinct + extra, trips=trips)


def works(batch, rows, width, features):
    """kernel -> ((dtype, row of configuration) -> its work)."""

    def grad_z(dtype, config):
        return product_work(rows, features, width, dtype, config, 4 * rows * cdiv(width, config.blocks["BLOCK_N"]))

    def grad_sigma(dtype, _):
        tiles = cdiv(width, pick("noise_projection_grad_z", dtype).blocks["BLOCK_N"])
        return Work(rows * tiles, rows * tiles * 4 + batch * SIZES[dtype], batch, trips=(tiles,))

    def grad_weight(dtype, config):
        blocks = config.blocks
        tiles_d, tiles_k = cdiv(features, blocks["BLOCK_M"]), cdiv(width, blocks["BLOCK_N"])
        splits, split_rows = splits_of(rows, blocks["BLOCK_K"], tiles_d * tiles_k)
        read = (tiles_k * rows * features + tiles_d * rows * width) * SIZES[dtype]
        written = splits * features * width * (4 if splits > 1 else SIZES[dtype])
        distinct = rows * (features + width) * SIZES[dtype] + written
        trips = (split_rows // blocks["BLOCK_K"],)
        return Work(2 * rows * width * features, read + written, splits * tiles_d * tiles_k, distinct, trips=trips)

    return {
        "noise_projection_forward": lambda *how: product_work(rows, width, features, *how),
        "noise_projection_grad_z": grad_z,
        "noise_projection_grad_sigma": grad_sigma,
        "noise_projection_grad_weight": grad_weight,
    }


def entries() -> list[Entry]:
    batch, tokens, width, features = 64, 256, 768, 768
    work = works(batch, batch * tokens, width, features)

    def entry(kernel, matrix=True, **constexprs):
        return Entry(
            kernel, "noise_projection", argument_types(kernel, **POINTERS), f"{batch} x {tokens} x {width} -> {features}",
            work[kernel.__name__], constexprs=constexprs, aligned=ALIGNED, matrix=matrix,
        )  # fmt: skip

    return [
        entry(noise_projection_forward, IN_ORDER=True),
        entry(noise_projection_grad_z, NEED_Z=True, NEED_SIGMA=True, IN_ORDER=True),
        entry(noise_projection_grad_weight, IN_ORDER=True),
        entry(noise_projection_grad_sigma, matrix=False),
    ]
