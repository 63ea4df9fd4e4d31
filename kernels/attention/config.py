"""Configurations of the attention kernels, by head dimension."""

from __future__ import annotations

from collections.abc import Mapping

from ..lib.config import ANY, TABLE, WITH_TMA, Config, Key

# Size classes: columns of a tile, the head dimension rounded up ("80": 64 + 16, for 72 and 80).
# Per row: queries and keys per block, warps, stages. The largest blocks that don't spill, with Triton 3.6 to 3.9; float32 keeps both TF32 halves of its operands.
# MI300 has 512 registers per thread at 4 warps, so one row per dtype serves all widths.
WIDTHS = ("64", "80", "96", "128", "192", "256")


def _attention(rows: Mapping[Key, tuple[int, int, int, int]], **more: int) -> dict[Key, Config]:
    return {
        key: Config({"BLOCK_QUERIES": q, "BLOCK_KEYS": k, **more}, warps, stages) for key, (q, k, warps, stages) in rows.items()
    }


def _tma(rows: Mapping[tuple[str, str], tuple[int, int, int, int]], warp_specialized: int) -> dict[Key, Config]:
    keyed = {(dtype, *key): row for dtype in ("bf16", "fp16") for key, row in rows.items()}
    return _attention(keyed, TMA=1, WARP_SPECIALIZED=warp_specialized)


TABLE["flash_attention_forward"] = _attention(
    {
        (ANY, "64", "sm_80"): (128, 64, 8, 3),
        (ANY, "80", "sm_80"): (128, 64, 8, 3),
        (ANY, "96", "sm_80"): (128, 64, 8, 3),
        (ANY, "128", "sm_80"): (128, 64, 8, 2),
        (ANY, "192", "sm_80"): (64, 32, 8, 2),
        (ANY, "256", "sm_80"): (64, 64, 8, 2),
        (ANY, "64", ANY): (128, 128, 8, 2),
        (ANY, "80", ANY): (128, 64, 8, 3),
        (ANY, "96", ANY): (128, 64, 8, 3),
        (ANY, "128", ANY): (128, 64, 8, 3),
        (ANY, "192", ANY): (128, 64, 8, 2),
        (ANY, "256", ANY): (128, 64, 8, 2),
        ("fp32", ANY, ANY): (128, 32, 8, 2),
        ("fp32", "128", "sm_80"): (64, 32, 8, 2),
        ("fp32", "192", ANY): (32, 32, 8, 2),
        ("fp32", "256", ANY): (32, 32, 8, 2),
        **{(ANY, size, "gfx942"): (64, 64, 4, 2 if size == "64" else 1) for size in WIDTHS},
        **{("fp32", size, "gfx942"): (64, 32, 4, 1) for size in WIDTHS},
    },
    TMA=0,
    WARP_SPECIALIZED=0,
)
# Not picked by default: `ov3fast tune` tries them unchanged, since most other warps and blocks fail, spill or can't be partitioned.
TABLE["flash_attention_forward"] |= _tma(
    {
        (f"{size} tma", architecture): row
        for architecture in WITH_TMA
        for size, row in {"64": (128, 128, 8, 2), "80": (128, 64, 8, 3), "128": (128, 64, 8, 3)}.items()
    },
    warp_specialized=0,
)
TABLE["flash_attention_forward"] |= _tma(
    {
        ("64 warp-specialized", "sm_90"): (128, 128, 4, 3),
        ("80 warp-specialized", "sm_90"): (128, 128, 4, 3),
        ("128 warp-specialized", "sm_90"): (128, 128, 4, 2),
        ("64 warp-specialized", "sm_100"): (128, 128, 4, 3),
        ("80 warp-specialized", "sm_100"): (128, 64, 4, 2),
        ("128 warp-specialized", "sm_100"): (128, 128, 8, 2),
    },
    warp_specialized=1,
)
TABLE["flash_attention_grad_q"] = _attention(
    {
        (ANY, "64", "sm_80"): (64, 32, 4, 2),
        (ANY, "64", "sm_100"): (64, 64, 4, 2),
        (ANY, "64", ANY): (128, 64, 8, 2),
        (ANY, "80", "sm_80"): (128, 32, 8, 2),
        (ANY, "96", "sm_80"): (128, 32, 8, 2),
        (ANY, "128", "sm_80"): (128, 32, 8, 2),
        (ANY, "192", "sm_80"): (64, 16, 4, 2),
        (ANY, "256", "sm_80"): (64, 32, 8, 2),
        (ANY, ANY, ANY): (128, 64, 8, 2),
        (ANY, "192", ANY): (64, 64, 8, 2),
        (ANY, "256", "sm_100"): (64, 64, 8, 1),
        (ANY, "256", ANY): (64, 64, 8, 2),
        ("fp32", ANY, ANY): (64, 32, 8, 2),
        ("fp32", "64", "sm_80"): (64, 32, 8, 2),
        ("fp32", "64", ANY): (128, 32, 8, 2),
        ("fp32", "80", ANY): (128, 32, 8, 2),
        ("fp32", "96", "sm_80"): (32, 64, 8, 2),
        ("fp32", "128", "sm_80"): (32, 32, 8, 2),
        ("fp32", "192", ANY): (32, 32, 8, 1),
        ("fp32", "256", ANY): (32, 32, 8, 2),
        **{(dtype, size, "gfx942"): (64, 32, 4, 1) for dtype in (ANY, "fp32") for size in WIDTHS},
    }
)
TABLE["flash_attention_grad_kv"] = _attention(
    {
        (ANY, "64", "sm_80"): (32, 128, 8, 2),
        (ANY, "80", "sm_80"): (32, 64, 4, 2),
        (ANY, "96", "sm_80"): (16, 64, 4, 2),
        (ANY, "128", "sm_80"): (64, 64, 8, 2),
        (ANY, "192", "sm_80"): (32, 32, 8, 2),
        (ANY, "256", "sm_80"): (32, 64, 8, 2),
        (ANY, "128", "sm_100"): (64, 128, 8, 2),
        (ANY, "64", ANY): (64, 128, 8, 2),
        (ANY, ANY, ANY): (32, 128, 8, 2),
        (ANY, "192", ANY): (64, 64, 8, 2),
        (ANY, "256", ANY): (64, 64, 8, 2),
        (ANY, "256", "sm_90"): (32, 64, 8, 2),
        ("fp32", ANY, ANY): (32, 32, 8, 2),
        ("fp32", "96", "sm_100"): (32, 32, 8, 1),
        ("fp32", "192", "sm_100"): (16, 32, 8, 1),
        ("fp32", "64", ANY): (16, 128, 8, 2),
        ("fp32", "80", ANY): (16, 128, 8, 2),
        ("fp32", "192", ANY): (16, 32, 8, 2),
        ("fp32", "256", ANY): (16, 32, 8, 2),
        **{(ANY, size, "gfx942"): (32, 64, 4, 1) for size in WIDTHS},
        **{("fp32", size, "gfx942"): (32, 32, 4, 1) for size in WIDTHS},
    }
)
