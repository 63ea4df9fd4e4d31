"""latent_projection: a launch of each kernel."""

from __future__ import annotations

from ...latent_projection import (
    latent_projection_forward,
    latent_projection_grad_bias,
    latent_projection_grad_tokens,
    latent_projection_grad_weight,
)
from ...lib.common import cdiv
from ...lib.config import pick
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


def forward_work(rows, values, width, dtype):
    blocks = pick("latent_projection_forward", dtype).blocks
    m, n = cdiv(rows, blocks["BLOCK_M"]), cdiv(values, blocks["BLOCK_N"])
    moved = n * rows * width + m * values * width + m * values + rows * values
    return Work(2 * rows * values * width, moved * SIZES[dtype])


def grad_tokens_work(rows, values, width, dtype):
    blocks = pick("latent_projection_grad_tokens", dtype).blocks
    m = cdiv(rows, blocks["BLOCK_M"])
    shares, _ = shares_of(width, m, blocks["BLOCK_N"])
    return Work(2 * rows * values * width, (shares * rows * values + m * values * width + rows * width) * SIZES[dtype])


def grad_weight_work(rows, values, width, dtype):
    blocks = pick("latent_projection_grad_weight", dtype).blocks
    tiles_k, tiles_d = cdiv(values, blocks["BLOCK_M"]), cdiv(width, blocks["BLOCK_N"])
    splits, _ = splits_of(rows, blocks["BLOCK_K"], tiles_k * tiles_d)
    read = (tiles_d * rows * values + tiles_k * rows * width) * SIZES[dtype]
    return Work(2 * rows * values * width, read + splits * values * width * (4 if splits > 1 else SIZES[dtype]))


def grad_bias_work(rows, values, dtype):
    strips, _ = strips_of(rows, pick("latent_projection_grad_bias", dtype).blocks["BLOCK_M"])
    return Work(rows * values, rows * values * SIZES[dtype] + strips * values * 4)


def entries() -> list[Entry]:
    rows, values, width = 64 * 256, 64, 768

    def entry(kernel, work, matrix=True, **constexprs):
        return Entry(
            kernel, "latent_projection", argument_types(kernel, **POINTERS), f"64 x 256 x {width} -> 64 x 16 x 32 x 32", work,
            constexprs={"PATCH": 2, **constexprs}, aligned=ALIGNED, matrix=matrix,
        )  # fmt: skip

    return [
        entry(latent_projection_forward, lambda dtype: forward_work(rows, values, width, dtype)),
        entry(latent_projection_grad_tokens, lambda dtype: grad_tokens_work(rows, values, width, dtype), WHOLE=True),
        entry(latent_projection_grad_weight, lambda dtype: grad_weight_work(rows, values, width, dtype)),
        entry(latent_projection_grad_bias, lambda dtype: grad_bias_work(rows, values, dtype), matrix=False),
    ]
