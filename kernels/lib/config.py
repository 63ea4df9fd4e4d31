"""Block sizes, warps and stages of every kernel: a static table, by kernel, dtype, size class and architecture. Nothing tunes by itself:
`ov3fast tune` writes a file of better rows for one device, which `pick` prefers.

The keys of a kernel's table are (dtype, size class, architecture), each of them or "any". `pick` returns the most specific row of those that
name the dtype, else of the others. Size classes are words that the kernel's launcher chooses, documented beside its rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import cuda_driver

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_DESCRIPTORS = ("sm_90", "sm_100")
"""Those that load tiles through tensor descriptors."""
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
"""(dtype, size class, architecture) in the table, (kernel, dtype, size class) in what tuning found."""
TABLE: dict[str, dict[Key, Config]] = {}
"""kernel -> (dtype, size class, architecture) -> row."""


def pick(kernel: str, dtype: str, size: str = ANY, architecture: str | None = None) -> Config:
    """The row for this call; without an architecture that of the current device, or what `ov3fast tune` found for it.

    KeyError where the table has none.
    """
    if architecture is None:
        asked = kernel, dtype, size
        if _picked is not None:
            _picked.add(asked)
        tuned = _trial.get(asked) or _tuned().get(asked)
        if tuned is not None:
            return tuned
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
    return sorted(keys, key=lambda key: (key[0] == ANY, key.count(ANY)))


def current_architecture() -> str:
    """Of the table's architectures, the one whose rows fit the current device; sm_80 for the interpreter."""
    return _architecture(torch.cuda.current_device()) if torch.cuda.is_available() else "sm_80"


@functools.cache
def _architecture(device: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


# --- what tuning finds ---

_trial: dict[Key, Config] = {}
_picked: set[Key] | None = None


@contextmanager
def trying(found: Mapping[Key, Config]) -> Iterator[set[Key]]:
    """Within the block these rows replace the table's; yields what is picked there."""
    global _trial, _picked
    before = _trial, _picked
    _trial, _picked = dict(found), set()
    try:
        yield _picked
    finally:
        _trial, _picked = before


def tuned_path() -> Path:
    """Where the rows found for the current device, its driver and this source of the kernels lie."""
    source = hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    ).hexdigest()[:16]
    driver = torch.version.hip or cuda_driver.version()
    folder = Path(os.environ.get("OV3FAST_CACHE") or "~/.cache/ov3fast").expanduser() / "tuned"
    return folder / f"{torch.cuda.get_device_name().replace(' ', '-')}-{driver}-{source}.json"


def _tuned() -> Mapping[Key, Config]:
    return _tuned_for(torch.cuda.current_device()) if torch.cuda.is_available() else {}


@functools.cache
def _tuned_for(device: int) -> Mapping[Key, Config]:
    """Of the current device, by whose number they are kept."""
    path = tuned_path()
    return load(path) if path.exists() else {}


def load(path: Path) -> dict[Key, Config]:
    return {tuple(row.pop("key")): Config(**row) for row in json.loads(path.read_text())}


def save(found: Mapping[Key, Config], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"key": key, **asdict(config)} for key, config in found.items()], indent=1))
    _tuned_for.cache_clear()


# --- flash_attention ---
# Size classes: columns of the tiles, those of the head dimension rounded up ("80": 64 + 16, for 72 and 80).
# Per row: queries and keys of a block, warps, stages. Widest blocks that spill nothing. float32 holds both tf32 halves of its operands.
# MI300 has 512 registers to a thread in 4 warps: there one row per dtype serves all widths.
ATTENTION_WIDTHS = ("64", "80", "96", "128", "192", "256")


def _attention(rows: Mapping[Key, tuple[int, int, int, int]], **more: int) -> dict[Key, Config]:
    return {
        key: Config({"BLOCK_QUERIES": q, "BLOCK_KEYS": k, **more}, warps, stages) for key, (q, k, warps, stages) in rows.items()
    }


def _described(rows: Mapping[tuple[str, str], tuple[int, int, int, int]], specialised: int) -> dict[Key, Config]:
    keyed = {(dtype, *key): row for dtype in ("bf16", "fp16") for key, row in rows.items()}
    return _attention(keyed, DESCRIPTORS=1, SPECIALIZED=specialised)


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
        ("fp32", "192", ANY): (32, 32, 8, 2),
        ("fp32", "256", ANY): (32, 32, 8, 2),
        **{(ANY, size, "gfx942"): (64, 64, 4, 1) for size in ATTENTION_WIDTHS},
        **{("fp32", size, "gfx942"): (64, 32, 4, 1) for size in ATTENTION_WIDTHS},
    },
    DESCRIPTORS=0,
    SPECIALIZED=0,
)
# No launch picks these by itself: `ov3fast tune` tries them as they stand, since most other warps and blocks fail, spill or divide nothing.
TABLE["flash_attention_forward"] |= _described(
    {
        (f"{size} descriptors", architecture): row
        for architecture in WITH_DESCRIPTORS
        for size, row in {"64": (128, 128, 8, 2), "80": (128, 64, 8, 3), "128": (128, 64, 8, 3)}.items()
    },
    specialised=0,
)
TABLE["flash_attention_forward"] |= _described(
    {
        ("64 specialised", "sm_90"): (128, 128, 4, 3),
        ("80 specialised", "sm_90"): (128, 128, 4, 3),
        ("128 specialised", "sm_90"): (128, 128, 4, 2),
        ("64 specialised", "sm_100"): (128, 128, 4, 3),
        ("80 specialised", "sm_100"): (128, 128, 4, 2),
        ("128 specialised", "sm_100"): (128, 128, 8, 2),
    },
    specialised=1,
)
TABLE["flash_attention_grad_q"] = _attention(
    {
        (ANY, "64", ANY): (128, 64, 8, 2),
        (ANY, "80", "sm_80"): (128, 32, 8, 2),
        (ANY, "96", "sm_80"): (128, 32, 8, 2),
        (ANY, "128", "sm_80"): (128, 32, 8, 2),
        (ANY, "192", "sm_80"): (64, 32, 8, 2),
        (ANY, ANY, ANY): (128, 64, 8, 2),
        (ANY, "192", ANY): (64, 64, 8, 2),
        (ANY, "256", ANY): (64, 64, 8, 2),
        ("fp32", ANY, ANY): (64, 32, 8, 2),
        ("fp32", "64", ANY): (128, 32, 8, 2),
        ("fp32", "80", ANY): (128, 32, 8, 2),
        ("fp32", "192", ANY): (32, 32, 8, 2),
        ("fp32", "256", ANY): (32, 32, 8, 2),
        **{(ANY, size, "gfx942"): (64, 64, 4, 1) for size in ATTENTION_WIDTHS},
        **{("fp32", size, "gfx942"): (64, 32, 4, 1) for size in ATTENTION_WIDTHS},
    }
)
TABLE["flash_attention_grad_kv"] = _attention(
    {
        (ANY, "64", "sm_80"): (32, 128, 8, 2),
        (ANY, "80", "sm_80"): (32, 128, 8, 2),
        (ANY, "96", "sm_80"): (32, 128, 8, 2),
        (ANY, "128", "sm_80"): (64, 64, 8, 2),
        (ANY, "192", "sm_80"): (32, 32, 8, 2),
        (ANY, "128", "sm_100"): (64, 128, 8, 2),
        (ANY, "64", ANY): (64, 128, 8, 2),
        (ANY, ANY, ANY): (32, 128, 8, 2),
        (ANY, "192", ANY): (64, 64, 8, 2),
        (ANY, "256", ANY): (64, 64, 8, 2),
        (ANY, "256", "sm_90"): (32, 64, 8, 2),
        ("fp32", ANY, ANY): (32, 32, 8, 2),
        ("fp32", "64", ANY): (16, 128, 8, 2),
        ("fp32", "80", ANY): (16, 128, 8, 2),
        ("fp32", "192", ANY): (16, 32, 8, 2),
        ("fp32", "256", ANY): (16, 32, 8, 2),
        **{(ANY, size, "gfx942"): (32, 64, 4, 1) for size in ATTENTION_WIDTHS},
        **{("fp32", size, "gfx942"): (32, 32, 4, 1) for size in ATTENTION_WIDTHS},
    }
)

# --- contrastive_loss ---
# Size class of the first two: "library", where tiles are read instead of multiplied. BLOCK_K must be one for all three kernels over tiles of a dtype, for the backward has to meet the forward's logits to the bit.
TABLE["contrastive_statistics"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=3),
    ("any", "any", "sm_90"): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3),
    ("fp32", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=2),
    ("fp32", "any", "sm_80"): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, warps=4, stages=2),
    ("any", "library", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=1),
}
TABLE["contrastive_gradients"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=3),
    ("any", "any", "sm_80"): Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=3),
    ("fp32", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, warps=4, stages=2),
    ("any", "library", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, warps=8, stages=1),
}
TABLE["contrastive_side"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
    ("fp32", "any", "any"): Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, warps=8, stages=1),
}
TABLE["contrastive_features"] = {("any", "any", "any"): Config({"BLOCK_R": 16, "BLOCK_D": 256}, warps=4, stages=1)}
TABLE["contrastive_project"] = {("any", "any", "any"): Config({"BLOCK_R": 8, "BLOCK_D": 256}, warps=4, stages=1)}
TABLE["contrastive_merge"] = {("any", "any", "any"): Config({"BLOCK": 128}, warps=1, stages=1)}

CONTRASTIVE_SCHEDULES = {
    ("any", "narrow"): "sides",
    ("any", "wide"): "tiles",
    ("any", "huge"): "library",
    ("fp32", "huge"): "tiles",
}
"""(dtype, size class) -> schedule of contrastive_loss.py. Size classes by width: narrow up to 256 (from 8192 rows on), wide up to 2048, huge beyond."""

# --- linear_cross_entropy ---
# Size classes: none.
TABLE["cross_entropy_rows"] = {
    ("any", "any", "any"): Config({"BLOCK_V": 8192}, warps=8, stages=1),
    ("fp32", "any", "any"): Config({"BLOCK_V": 4096}, warps=8, stages=1),
}

# --- mlp ---
# Size classes: "small", fewer than 128 tiles of 128 x 128; else "large".


def _products(large: Config, hopper: Config, blackwell: Config, **more: int) -> dict[Key, Config]:
    """Rows of a tiled product. float32 multiplies in three tf32 products, which fill the registers of small tiles; MI300 has 64 KiB to share."""
    narrow = {"BLOCK_M": 64, "BLOCK_N": 64, "GROUP": 8, **more}
    return {
        (ANY, "large", ANY): large,
        (ANY, "large", "sm_90"): hopper,
        (ANY, "large", "sm_100"): blackwell,
        (ANY, "large", "gfx942"): replace(large, stages=2),
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

# --- reduce ---
TABLE["column_partials"] = {(ANY, ANY, ANY): Config({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256}, warps=4, stages=1)}
TABLE["column_merge"] = {(ANY, ANY, ANY): Config({"BLOCK_PARTS": 128, "BLOCK_COLUMNS": 32}, warps=8, stages=1)}
TABLE["merge_splits"] = {("any", "any", "any"): Config({"BLOCK": 1024}, warps=4, stages=1)}

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
# Size classes: none. BLOCK_K of the forward holds a whole patch of 64 values.
TABLE["patch_embed_forward"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, warps=4, stages=1),
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
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, warps=4, stages=1),
    ("bf16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
    ("fp16", "any", "any"): Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}, warps=8, stages=2),
}
TABLE["latent_projection_grad_weight"] = {
    ("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, warps=8, stages=3)
}
TABLE["latent_projection_grad_bias"] = {("any", "any", "any"): Config({"BLOCK_M": 64, "BLOCK_K": 64}, warps=4, stages=1)}

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
        ("fp32", "channels_last", "any"): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=8, stages=1),
        ("any", "plain", "any"): Config({"BLOCK_S": 1024, "BLOCK_C": 4}, warps=4, stages=1),
        ("any", "small", "any"): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=4, stages=1),
        ("fp32", "small", "any"): Config({"BLOCK_S": 64, "BLOCK_C": 64}, warps=8, stages=1),
    }
TABLE["group_norm_silu_statistics"] = {("any", "any", "any"): Config({"BLOCK": 256}, warps=4, stages=1)}
TABLE["group_norm_silu_backward_groups"] = {("any", "any", "any"): Config({"BLOCK": 256}, warps=4, stages=1)}
TABLE["group_norm_silu_backward_channels"] = {("any", "any", "any"): Config({"BLOCK_R": 64, "BLOCK_C": 32}, warps=4, stages=1)}

# --- the end ---
