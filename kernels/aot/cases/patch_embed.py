"""patch_embed: a launch of each kernel, on moments that are sampled."""

from __future__ import annotations

from ...lib.common import cdiv
from ...lib.config import pick
from ...lib.patches import shares_of
from ...lib.reduce import splits_of
from ...patch_embed import patch_embed_forward, patch_embed_grad_latents, patch_embed_grad_weight
from ..catalog import SIZES, Entry, Work, argument_types

POINTERS = {
    **dict.fromkeys(("latents", "weight", "bias", "pos_embed", "cls_token", "y", "grad_y", "grad_latents"), "*{}"),
    **dict.fromkeys(("scale", "shift"), "fp32"),
    "partials": "*fp32",
    "rng": "*i64",
}
ALIGNED = (
    "stride_b", "stride_c", "stride_h", "grad_stride_b", "grad_stride_n", "weight_stride", "rows", "tokens", "features", "split_rows",
)  # fmt: skip


def forward_work(batch, tokens, values, features, cls, dtype):
    """Latents are moments; the weight is read once per tile of patches, position embeddings once per instance."""
    blocks, size = pick("patch_embed_forward", dtype).blocks, SIZES[dtype]
    rows = batch * tokens
    patch_tiles = cdiv(rows, blocks["BLOCK_M"])
    shares, _ = shares_of(features, patch_tiles, blocks["BLOCK_N"])
    read = shares * rows * 2 * values + patch_tiles * features * (values + 3) + rows * features
    return Work(2 * rows * values * features, (read + batch * (tokens + cls) * features) * size)


def grad_latents_work(batch, tokens, values, features, dtype):
    blocks, size = pick("patch_embed_grad_latents", dtype).blocks, SIZES[dtype]
    rows = batch * tokens
    tiles, patch_tiles = cdiv(values, blocks["BLOCK_N"]), cdiv(rows, blocks["BLOCK_M"])
    moved = tiles * rows * features + patch_tiles * features * values + rows * values * 3
    return Work(2 * rows * values * features, moved * size)


def grad_weight_work(batch, tokens, values, features, dtype):
    blocks, size = pick("patch_embed_grad_weight", dtype).blocks, SIZES[dtype]
    rows = batch * tokens
    tiles_d, tiles_k = cdiv(features, blocks["BLOCK_M"]), cdiv(values, blocks["BLOCK_N"])
    splits, _ = splits_of(rows, blocks["BLOCK_K"], tiles_d * tiles_k)
    read = tiles_k * rows * features + tiles_d * rows * 2 * values
    return Work(2 * rows * values * features, read * size + splits * features * values * (4 if splits > 1 else size))


def entries() -> list[Entry]:
    batch, tokens, values, features = 64, 256, 64, 768
    problem = f"moments {batch} x 32 x 32 x 32, 2 x 2 -> {features}"

    def entry(kernel, work, **constexprs):
        return Entry(
            kernel, "patch_embed", argument_types(kernel, **POINTERS), problem, work,
            constexprs={"PATCH": 2, "SAMPLE": True, "IN_ORDER": True, **constexprs}, aligned=ALIGNED, matrix=True,
        )  # fmt: skip

    sizes = batch, tokens, values, features
    return [
        entry(patch_embed_forward, lambda dtype: forward_work(*sizes, 1, dtype), CLS=1, WHOLE=True),
        entry(patch_embed_grad_latents, lambda dtype: grad_latents_work(*sizes, dtype), MOMENTS=True),
        entry(patch_embed_grad_weight, lambda dtype: grad_weight_work(*sizes, dtype)),
    ]
