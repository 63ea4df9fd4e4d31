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


def product_work(name, rows, left, right, dtype, extra=0):
    """A product [rows, left] x [left, right] in tiles: each factor is read once per tile of the other's outer axis."""
    blocks = pick(name, dtype).blocks
    m, n = cdiv(rows, blocks["BLOCK_M"]), cdiv(right, blocks["BLOCK_N"])
    return Work(2 * rows * left * right, (n * rows * left + m * left * right + rows * right) * SIZES[dtype] + extra)


def works(batch, rows, width, features):
    """kernel -> (dtype -> its work)."""

    def grad_z(dtype):
        tiles = cdiv(width, pick("noise_projection_grad_z", dtype).blocks["BLOCK_N"])
        return product_work("noise_projection_grad_z", rows, features, width, dtype, 4 * rows * tiles)

    def grad_sigma(dtype):
        tiles = cdiv(width, pick("noise_projection_grad_z", dtype).blocks["BLOCK_N"])
        return Work(rows * tiles, rows * tiles * 4 + batch * SIZES[dtype])

    def grad_weight(dtype):
        blocks = pick("noise_projection_grad_weight", dtype).blocks
        tiles_d, tiles_k = cdiv(features, blocks["BLOCK_M"]), cdiv(width, blocks["BLOCK_N"])
        splits, _ = splits_of(rows, blocks["BLOCK_K"], tiles_d * tiles_k)
        read = (tiles_k * rows * features + tiles_d * rows * width) * SIZES[dtype]
        written = splits * features * width * (4 if splits > 1 else SIZES[dtype])
        return Work(2 * rows * width * features, read + written)

    return {
        "noise_projection_forward": lambda dtype: product_work("noise_projection_forward", rows, width, features, dtype),
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
