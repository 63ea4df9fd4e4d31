"""Block sizes, warps and stages: each kernel's file defines its configurations by dtype, size class and architecture, and `pick` selects one.

There is no autotuning at run time. Configurations measured to be faster on a GPU are in kernels/measured.csv, written by `python -m tools.gpu.results`,
and take precedence; `ov3fast tune` writes a file for one device, which takes precedence over both. A key is (dtype, size class, architecture),
each of which may be "any"; `pick` returns the most specific row among those that name the dtype, else among the others. Size classes are strings chosen
by the kernel's launcher and documented next to its rows.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import cuda_driver

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_TMA = ("sm_90", "sm_100")
"""Architectures with a Tensor Memory Accelerator."""
ANY = "any"


@dataclass(frozen=True)
class Config:
    """One configuration: the constexprs that it sets, and the compile options."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.blocks.items())
        return f"{blocks or 'no blocks'}, {self.warps} warps, {self.stages} stages"


Key = tuple[str, str, str]
"""(dtype, size class, architecture) in the table, (kernel, dtype, size class) in tuning results."""
TABLE: dict[str, dict[Key, Config]] = {}
"""kernel -> (dtype, size class, architecture) -> row. Filled as the kernels' modules are imported."""


def pick(kernel: str, dtype: str, size: str = ANY, architecture: str | None = None, *, tuned: bool = True) -> Config:
    """The row for this call. architecture: default, that of the current device. tuned: use measured and tuned rows too.

    Raises KeyError if the table has none.
    """
    if architecture is None and tuned:
        asked = kernel, dtype, size
        if _picked is not None:
            _picked.add(asked)
        better = _trial.get(asked) or _tuned().get(asked)
        if better is not None:
            return better
    rows, arch = TABLE[kernel], architecture or current_architecture()
    if tuned and (won := measured().get((kernel, dtype, size, arch))) is not None:
        return won
    for key in _from_specific_to_any(dtype, size, arch):
        if key in rows:
            return rows[key]
    raise KeyError(f"configs: kernel {kernel!r} has no row for dtype {dtype}, size {size}, architecture {arch}")


def sizes(kernel: str) -> tuple[str, ...]:
    """The size classes that the kernel's rows name."""
    return tuple(sorted({size for _, size, _ in TABLE[kernel]}))


@functools.lru_cache(4096)
def _from_specific_to_any(dtype: str, size: str, arch: str) -> list[Key]:
    keys = [(d, s, a) for d in (dtype, ANY) for s in (size, ANY) for a in (arch, ANY)]
    return sorted(keys, key=lambda key: (key[0] == ANY, key.count(ANY)))


def current_architecture() -> str:
    """The table's architecture for the current device; sm_80 for the interpreter."""
    return _architecture(torch.cuda.current_device()) if _there_is_a_gpu() else "sm_80"


@functools.cache
def _there_is_a_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _architecture(device: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def has_tma() -> bool:
    """Whether the current device has a Tensor Memory Accelerator."""
    return current_architecture() in WITH_TMA


# --- measured rows ---

MEASURED = Path(__file__).parents[1] / "measured.csv"
COLUMNS = ("kernel", "dtype", "size", "architecture", "blocks", "warps", "stages", "share", "gpu", "torch", "triton", "commit")
"""`share`: the call's time relative to that with the row it replaces."""


@functools.cache
def measured() -> Mapping[tuple[str, str, str, str], Config]:
    """(kernel, dtype, size class, architecture) -> the fastest measured row."""
    with MEASURED.open(newline="", encoding="utf-8") as file:
        return {
            (row["kernel"], row["dtype"], row["size"], row["architecture"]): Config(
                json.loads(row["blocks"]), int(row["warps"]), int(row["stages"])
            )
            for row in csv.DictReader(file)
        }


# --- tuned rows ---

_trial: dict[Key, Config] = {}
_picked: set[Key] | None = None
generation = 0
"""Incremented whenever `pick` may return other rows; -1 while rows are being tried. Caches of rows check it."""


@contextmanager
def trying(found: Mapping[Key, Config]) -> Iterator[set[Key]]:
    """Replaces the table's rows within the block; yields the set of keys that are looked up there."""
    global _trial, _picked, generation
    before = _trial, _picked, generation
    _trial, _picked, generation = dict(found), set(), -1
    try:
        yield _picked
    finally:
        _trial, _picked, generation = before


def tuned_path() -> Path:
    """File of the rows tuned for the current device, its driver and this version of the kernels."""
    source = hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    ).hexdigest()[:16]
    driver = torch.version.hip or cuda_driver.version()
    folder = Path(os.environ.get("OV3FAST_CACHE") or "~/.cache/ov3fast").expanduser() / "tuned"
    return folder / f"{torch.cuda.get_device_name().replace(' ', '-')}-{driver}-{source}.json"


def _tuned() -> Mapping[Key, Config]:
    return _tuned_for(torch.cuda.current_device()) if _there_is_a_gpu() else {}


@functools.cache
def _tuned_for(device: int) -> Mapping[Key, Config]:
    """The tuned rows of a device, cached by its index."""
    path = tuned_path()
    return load(path) if path.exists() else {}


def load(path: Path) -> dict[Key, Config]:
    return {tuple(row.pop("key")): Config(**row) for row in json.loads(path.read_text())}


def save(found: Mapping[Key, Config], path: Path) -> None:
    global generation
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"key": key, **asdict(config)} for key, config in found.items()], indent=1))
    _tuned_for.cache_clear()
    generation += 1
