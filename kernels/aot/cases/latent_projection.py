"""latent_projection: each kernel."""

from __future__ import annotations

from ...latent_projection import (
    latent_projection_forward,
    latent_projection_grad_bias,
    latent_projection_grad_tokens,
    latent_projection_grad_weight,
)
from ...lib.common import cdiv
from ...lib.patches import shares_of
from ...lib.reduce import splits_of, strips_of
from ..catalog import SIZES, Entry, Work, argument_types

POINTERS = {
    **dict.fromkeys(("token_rows", "weight", "bias", "x", "grad_x", "grad_tokens"), "*{}"),
    "partials": "*fp32",
}
ALIGNED = (
    "stride_b", "stride_n", "stride_c", "stride_h", "token_stride_b", "token_stride_n", "weight_stride",
    "rows", "tokens", "values", "width", "split_rows", "strip_rows", "grid_w",
)  # fmt: skip


def forward_work(rows, values, width, dtype, config):
    blocks = config.blocks
    m, n = cdiv(rows, blocks["BLOCK_M"]), cdiv(values, blocks["BLOCK_N"])
    moved = n * rows * width + m * values * width + m * values + rows * values
    distinct = rows * width + values * width + values + rows * values
    return Work(
        2 * rows * values * width, moved * SIZES[dtype], m * n, distinct * SIZES[dtype], trips=(cdiv(width, blocks["BLOCK_K"]),)
    )


def grad_tokens_work(rows, values, width, dtype, config):
    blocks = config.blocks
    m = cdiv(rows, blocks["BLOCK_M"])
    shares, share_tiles = shares_of(width, m, blocks["BLOCK_N"])
    moved = shares * rows * values + m * values * width + rows * width
    distinct = rows * values + values * width + rows * width
    size = SIZES[dtype]
    return Work(2 * rows * values * width, moved * size, m * shares, distinct * size, trips=(share_tiles,))


def grad_weight_work(rows, values, width, dtype, config):
    blocks = config.blocks
    tiles_k, tiles_d = cdiv(values, blocks["BLOCK_M"]), cdiv(width, blocks["BLOCK_N"])
    splits, split_rows = splits_of(rows, blocks["BLOCK_K"], tiles_k * tiles_d)
    read = (tiles_d * rows * values + tiles_k * rows * width) * SIZES[dtype]
    written = splits * values * width * (4 if splits > 1 else SIZES[dtype])
    distinct = (rows * values + rows * width) * SIZES[dtype] + written
    trips = (split_rows // blocks["BLOCK_K"],)
    return Work(2 * rows * values * width, read + written, splits * tiles_k * tiles_d, distinct, trips=trips)


def grad_bias_work(rows, values, dtype, config):
    strips, _ = strips_of(rows, config.blocks["BLOCK_M"])
    programs = strips * cdiv(values, config.blocks["BLOCK_K"])
    return Work(rows * values, rows * values * SIZES[dtype] + strips * values * 4, programs)


def entries() -> list[Entry]:
    rows, values, width = 64 * 256, 64, 768

    def entry(kernel, work, matrix=True, **constexprs):
        return Entry(
            kernel, "latent_projection", argument_types(kernel, **POINTERS), f"64 x 256 x {width} -> 64 x 16 x 32 x 32", work,
            constexprs={"PATCH": 2, **constexprs}, aligned=ALIGNED, matrix=matrix,
        )  # fmt: skip

    return [
        entry(latent_projection_forward, lambda *how: forward_work(rows, values, width, *how)),
        entry(latent_projection_grad_tokens, lambda *how: grad_tokens_work(rows, values, width, *how), WHOLE=True),
        entry(latent_projection_grad_weight, lambda *how: grad_weight_work(rows, values, width, *how)),
        entry(latent_projection_grad_bias, lambda *how: grad_bias_work(rows, values, *how), matrix=False),
    ]
