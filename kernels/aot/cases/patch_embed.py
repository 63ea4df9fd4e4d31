"""patch_embed: each kernel, on sampled moments."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.patches import shares_of
from ...lib.reduce import splits_of
from ...patch_embed import (
    PROGRAMS,
    patch_embed_forward,
    patch_embed_grad_latents,
    patch_embed_grad_weight,
    patch_embed_patches,
    patch_embed_vectors,
)
from ..catalog import SIZES, Entry, Work, argument_types

POINTERS = {
    **dict.fromkeys(("latents", "weight", "bias", "pos_embed", "cls_token", "y", "grad_y", "grad_latents", "x"), "*{}"),
    "partials": "*fp32",
    **dict.fromkeys(("scale", "shift"), "fp32"),
    "rng": "*i64",
}
ALIGNED = (
    "stride_b", "stride_c", "stride_h", "grad_stride_b", "grad_stride_n", "weight_stride", "rows", "tokens", "features", "values",
    "split_rows",
)  # fmt: skip


def forward_work(batch, tokens, values, features, cls, dtype, config):
    """Latents are moments; the weight is read once per tile of patches, the position embedding once per image."""
    blocks, size = config.blocks, SIZES[dtype]
    rows = batch * tokens
    patch_tiles = cdiv(rows, blocks["BLOCK_M"])
    shares, share_tiles = shares_of(features, patch_tiles, blocks["BLOCK_N"], PROGRAMS)
    read = shares * rows * 2 * values + patch_tiles * features * (values + 3) + rows * features
    written = batch * (tokens + cls) * features
    distinct = rows * 2 * values + features * (values + 3 + tokens) + written
    return Work(
        2 * rows * values * features, (read + written) * size, patch_tiles * shares, distinct * size, trips=(share_tiles,)
    )


def grad_latents_work(batch, tokens, values, features, dtype, config):
    blocks, size = config.blocks, SIZES[dtype]
    rows = batch * tokens
    tiles, patch_tiles = cdiv(values, blocks["BLOCK_N"]), cdiv(rows, blocks["BLOCK_M"])
    moved = tiles * rows * features + patch_tiles * features * values + rows * values * 3
    distinct = rows * features + features * values + rows * values * 3
    trips = (cdiv(features, blocks["BLOCK_K"]),)
    return Work(2 * rows * values * features, moved * size, tiles * patch_tiles, distinct * size, trips=trips)


OPERATIONS = 45
"""Operations per random number: a quarter of those for a block of four."""


def patches_work(batch, tokens, values, dtype, config):
    blocks, rows = config.blocks, batch * tokens
    moved = rows * 3 * values * SIZES[dtype]
    return Work(OPERATIONS * rows * values, moved, cdiv(rows, blocks["BLOCK_M"]) * cdiv(values, blocks["BLOCK_K"]))


def grad_weight_work(batch, tokens, values, features, dtype, config):
    """Of its bytes the partial products are written once; reduce's merge_splits reads them."""
    blocks, size, rows = config.blocks, SIZES[dtype], batch * tokens
    tiles_d, tiles_k = cdiv(features, blocks["BLOCK_M"]), cdiv(values, blocks["BLOCK_N"])
    splits, split_rows = splits_of(rows, blocks["BLOCK_K"], tiles_d * tiles_k)
    written = splits * values * features * (4 if splits > 1 else size)
    moved = (tiles_k * rows * features + tiles_d * rows * values) * size + written
    distinct = rows * (features + values) * size + written
    trips = (split_rows // blocks["BLOCK_K"],)
    return Work(2 * rows * values * features, moved, splits * tiles_d * tiles_k, distinct, trips=trips)


def vectors_work(tokens, features, size, config):
    """With a CLS token, whose row is read beside the others."""
    return Work(tokens * features, features * (4 * (tokens + 1) + 2 * size), cdiv(features, config.blocks["BLOCK_D"]))


def entries() -> list[Entry]:
    batch, tokens, values, features = 64, 256, 64, 768
    problem = f"moments {batch} x 32 x 32 x 32, 2 x 2 -> {features}"

    def entry(kernel, work, matrix=True, **constexprs):
        return Entry(
            kernel, "patch_embed", argument_types(kernel, **POINTERS), problem, work,
            constexprs=constexprs, aligned=ALIGNED, matrix=matrix,
        )  # fmt: skip

    sizes, drawn = (batch, tokens, values, features), {"PATCH": 2, "SAMPLE": True, "IN_ORDER": True}
    return [
        entry(patch_embed_forward, lambda *how: forward_work(*sizes, 1, *how), CLS=1, WHOLE=True, **drawn),
        entry(patch_embed_grad_latents, lambda *how: grad_latents_work(*sizes, *how), MOMENTS=True, **drawn),
        entry(patch_embed_patches, lambda *how: patches_work(batch, tokens, values, *how), matrix=False, **drawn),
        entry(patch_embed_grad_weight, lambda *how: grad_weight_work(*sizes, *how)),
        Entry(
            patch_embed_vectors,
            "patch_embed",
            argument_types(patch_embed_vectors, sums="*fp32", grad_bias="*{}", grad_cls="*{}"),
            problem,
            lambda dtype, config: vectors_work(tokens, features, SIZES[dtype], config),
            aligned=("width",),
            streaming=True,
        ),
    ]
