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

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.blocks.items())
        return f"{blocks or 'no blocks'}, {self.warps} warps, {self.stages} stages"


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


def sizes(kernel: str) -> tuple[str, ...]:
    """The size classes that the kernel's rows name."""
    return tuple(sorted({size for _, size, _ in TABLE[kernel]}))


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
# Size classes: columns of the tiles, those of the head dimension rounded up ("80": 64 + 16, for 72 and 80).
TABLE["flash_attention_forward"] = {("any", "any", "any"): Config({"BLOCK_QUERIES": 128, "BLOCK_KEYS": 64}, warps=8, stages=2)}
TABLE["flash_attention_grad_q"] = {("any", "any", "any"): Config({"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64}, warps=4, stages=2)}
TABLE["flash_attention_grad_kv"] = {("any", "any", "any"): Config({"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64}, warps=4, stages=2)}

# --- contrastive_loss ---

# --- linear_cross_entropy ---

# --- mlp ---

# --- linear ---

# --- layer_norm ---
# Size classes: none; one program holds whole rows, so BLOCK_D comes from the width.

# --- patch_embed ---

# --- noise_projection ---

# --- latent_projection ---

# --- random ---

# --- group_norm_silu ---

# --- the end ---
