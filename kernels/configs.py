"""Block sizes, warps and stages of every kernel: a static table, by kernel, dtype, size class and architecture. Nothing tunes by itself.

`pick` returns the most specific row: the keys of a kernel's table are (dtype, size class, architecture), each of them or "any". Size classes
are words that the kernel's launcher chooses, documented beside its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
ANY = "any"


@dataclass(frozen=True)
class Config:
    """One row: the constexprs that it sets, and how the kernel is compiled."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


Key = tuple[str, str, str]
TABLE: dict[str, dict[Key, Config]] = {}
"""kernel -> (dtype, size class, architecture) -> row."""


def pick(kernel: str, dtype: str, size: str = ANY, architecture: str | None = None) -> Config:
    """The row for this call; `architecture` defaults to the current device's. KeyError where the table has none."""
    rows, arch = TABLE[kernel], architecture or current_architecture()
    for key in _from_specific_to_any(dtype, size, arch):
        if key in rows:
            return rows[key]
    raise KeyError(f"configs: kernel {kernel!r} has no row for dtype {dtype}, size {size}, architecture {arch}")


def _from_specific_to_any(dtype: str, size: str, arch: str) -> list[Key]:
    keys = [(d, s, a) for d in (dtype, ANY) for s in (size, ANY) for a in (arch, ANY)]
    return sorted(keys, key=lambda key: key.count(ANY))


@functools.cache
def current_architecture() -> str:
    """Of the table's architectures, the one whose rows fit the current device; sm_80 for the interpreter."""
    if not torch.cuda.is_available():
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability()[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


# --- flash_attention ---

# --- contrastive_loss ---

# --- linear_cross_entropy ---

# --- mlp ---
# Size classes: "small", fewer than 128 tiles of 128 x 128; else "large".


def _products(large: Config, hopper: Config, blackwell: Config, **more: int) -> dict[Key, Config]:
    """Rows of a tiled product. float32 multiplies in three tf32 products, which fill the registers of small tiles."""
    narrow = {"BLOCK_M": 64, "BLOCK_N": 64, "GROUP": 8, **more}
    return {
        (ANY, "large", ANY): large,
        (ANY, "large", "sm_90"): hopper,
        (ANY, "large", "sm_100"): blackwell,
        (ANY, "small", ANY): Config({**narrow, "BLOCK_K": 64}, warps=4, stages=3),
        **{
            ("fp32", size, a): Config({**narrow, "BLOCK_K": 32}, warps=4, stages=3)
            for size in ("large", "small")
            for a in ARCHITECTURES
        },
    }


def _square(depth: int, **more: int) -> Config:
    return Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": depth, "GROUP": 8, **more}, warps=8, stages=4)


TABLE["mlp_forward"] = _products(_square(32, HALVES=0), _square(64, HALVES=0), _square(64, HALVES=0), HALVES=0)
# Its epilogue has to hold h, both results and the tile, which for a whole tile of 128 x 128 spills.
TABLE["mlp_backward"] = _products(_square(32, HALVES=1), _square(64, HALVES=1), _square(64, HALVES=1), HALVES=0)

# --- linear ---
# Size classes: those of mlp.
TABLE["linear"] = _products(_square(32), _square(64), _square(64))
TABLE["column_partials"] = {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256}, warps=4, stages=1)}
TABLE["column_merge"] = {(ANY, ANY, ANY): Config({"BLOCK_PARTS": 128, "BLOCK_COLUMNS": 32}, warps=8, stages=1)}

# --- layer_norm ---
# Size classes: the smallest of these that holds a row; a program holds whole rows.
LAYER_NORM_WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
TABLE["layer_norm_forward"] = {
    (ANY, str(d), ANY): Config({"BLOCK_ROWS": max(1, 4096 // d), "BLOCK_D": d}, warps=max(4, d // 1024), stages=1)
    for d in LAYER_NORM_WIDTHS
}
# 16 elements a thread: five of each live in registers.
TABLE["layer_norm_backward"] = {
    (ANY, str(d), ANY): Config({"BLOCK_ROWS": max(1, 2048 // d), "BLOCK_D": d}, warps=max(4, d // 512), stages=1)
    for d in LAYER_NORM_WIDTHS
}

# --- patch_embed ---

# --- noise_projection ---

# --- latent_projection ---

# --- random ---

# --- group_norm_silu ---

# --- the end ---
