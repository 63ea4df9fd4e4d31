"""What processor this is, as far as the choice of a backend asks."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

UNKNOWN = "unknown"

# name: the vendor, the family (None: any) and the flags that the name stands for. A virtual machine that hides the flags is no such chip.
CHIPS = {
    "amx": ("GenuineIntel", None, {"amx_tile", "amx_bf16"}),  # Sapphire, Emerald and Granite Rapids
    "zen5": ("AuthenticAMD", 26, {"avx512_bf16"}),
    "zen4": ("AuthenticAMD", 25, {"avx512_bf16"}),  # Zen 3 is of the same family, without AVX-512
}


@dataclass(frozen=True)
class Chip:
    name: str
    """A key of CHIPS, or "unknown"."""
    model: str
    """In the vendor's words, with family and model where the system tells."""


def identify(cpuinfo: str) -> Chip:
    """The chip that a text of the form of Linux's /proc/cpuinfo describes; its first processor counts."""
    lines = cpuinfo.strip().split("\n\n")[0].splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vendor, family, flags = facts.get("vendor_id"), facts.get("cpu family", ""), set(facts.get("flags", "").split())
    number = int(family) if family.isdigit() else None
    name = next(
        (name for name, (made_by, of, needs) in CHIPS.items() if vendor == made_by and of in (None, number) and needs <= flags),
        UNKNOWN,
    )
    model = facts.get("model name") or platform.processor() or platform.machine()
    return Chip(name, f"{model} family {family} model {facts['model']}" if family and "model" in facts else model)


@functools.cache
def current() -> Chip:
    """This machine's; unknown where the system has no /proc/cpuinfo."""
    try:
        return identify(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return identify("")
