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

# --- linear ---

# --- layer_norm ---
# Size classes: none; one program holds whole rows, so BLOCK_D comes from the width.

# --- patch_embed ---
# Size classes: none. BLOCK_K of the forward holds a whole patch of 64 values.
TABLE["patch_embed_forward"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=1),
    ("bf16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
    ("fp16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
}
TABLE["patch_embed_grad_latents"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=3)
}
TABLE["patch_embed_grad_weight"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, warps=8, stages=3)
}

# --- noise_projection ---
# Size classes: none. The noise of a row is drawn once per tile of features, hence the wide tiles.
for _name in ("noise_projection_forward", "noise_projection_grad_z", "noise_projection_grad_weight"):
    TABLE[_name] = {
        ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=2),
        ("bf16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3),
        ("fp16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3),
    }
TABLE["noise_projection_grad_sigma"] = {("any", "any", "any"): Config({"BLOCK": 256}, warps=4, stages=1)}

# --- latent_projection ---
# Size classes: none. BLOCK_K of grad_tokens holds a whole patch of 64 values.
TABLE["latent_projection_forward"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=3)
}
TABLE["latent_projection_grad_tokens"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=1),
    ("bf16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
    ("fp16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
}
TABLE["latent_projection_grad_weight"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3)
}
TABLE["latent_projection_grad_bias"] = {("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_K": 64}, warps=4, stages=1)}

# --- sums (of the three above) ---
TABLE["column_sums"] = {("any", "any", "any"): Config({"BLOCK_R": 16, "BLOCK_D": 128}, warps=4, stages=1)}
TABLE["merge_splits"] = {("any", "any", "any"): Config({"BLOCK": 1024}, warps=4, stages=1)}

# --- random ---
# Size classes: none.
TABLE["random_normal"] = {("any", "any", "any"): Config({"BLOCK": 1024}, warps=4, stages=1)}
TABLE["random_words"] = {("any", "any", "any"): Config({"BLOCK": 1024}, warps=4, stages=1)}

# --- group_norm_silu ---
# Size classes: "channels_last"; otherwise "plain", or "small" below 256 places.
for _name in ("group_norm_silu_forward", "group_norm_silu_backward"):
    TABLE[_name] = {
        ("any", "channels_last", "any"): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=4, stages=1),
        ("any", "plain", "any"): Config({"BLOCK_S": 512, "BLOCK_C": 4}, warps=4, stages=1),
        ("any", "small", "any"): Config({"BLOCK_S": 64, "BLOCK_C": 32}, warps=4, stages=1),
    }
    TABLE[_name + "_partials"] = {
        ("any", "channels_last", "any"): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=4, stages=1),
        ("any", "plain", "any"): Config({"BLOCK_S": 1024, "BLOCK_C": 4}, warps=4, stages=1),
        ("any", "small", "any"): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=4, stages=1),
    }
TABLE["group_norm_silu_statistics"] = {("any", "any", "any"): Config({"BLOCK": 256}, warps=4, stages=1)}
TABLE["group_norm_silu_backward_groups"] = {("any", "any", "any"): Config({"BLOCK": 256}, warps=4, stages=1)}
TABLE["group_norm_silu_backward_channels"] = {("any", "any", "any"): Config({"BLOCK_R": 64, "BLOCK_C": 32}, warps=4, stages=1)}

# --- the end ---
