"""Reads a compiled kernel's resource usage from its machine code: registers, stack, spills, memory accesses by width, matrix instructions,
and the contents of its loops.

NVIDIA: with `cuobjdump` and `nvdisasm`, which ship with Triton. AMD: from the assembly text and the metadata at its end.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import loops

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_NVIDIA_MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|DMMA|QGMMA|UTC\w*MMA|OMMA)\b")
_NVIDIA_ACCESS = {"LDG", "STG", "LDGSTS"}
# Tensor-descriptor and bulk copies move entire rows of a tile.
_NVIDIA_BULK = {"UTMALDG", "UTMASTG", "UBLKCP"}
_NVIDIA_ATOMIC = {"ATOM", "ATOMG", "RED", "REDG", "UTMAREDG", "REDAS", "UBLKRED"}

_AMD_ACCESS = re.compile(r"^\s+((?:global|buffer|flat)_(?:load|store)_\w+)", re.MULTILINE)
_AMD_ATOMIC = re.compile(r"^\s+((?:global|buffer|flat)_atomic_\w+)", re.MULTILINE)
_AMD_MATRIX = re.compile(r"^\s+(v_s?mfmac?_\w+)", re.MULTILINE)


def of_nvidia(cubin: bytes) -> dict[str, Any]:
    """registers, stack_bytes, spills, mma, share16, atomics and loops of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", path), _tool("nvdisasm", "-c", "-ndf", path)
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = [opcode.split(".") for opcode in _INSTRUCTION.findall(sass)]
    if not opcodes or "REG" not in resources:
        raise RuntimeError(f"cuobjdump and nvdisasm printed nothing about the kernel:\n{usage[:500]}\n{sass[:500]}")
    widths = Counter(_nvidia_width(parts) for parts in opcodes if parts[0] in _NVIDIA_ACCESS | _NVIDIA_BULK)
    return {
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"] + resources.get("LOCAL", 0),
        "spills": sum(parts[0] in ("LDL", "STL") for parts in opcodes),
        "mma": _count(".".join(parts) for parts in opcodes if _NVIDIA_MATRIX.match(parts[0])),
        "share16": _share(widths),
        "atomics": _count(".".join(parts) for parts in opcodes if parts[0] in _NVIDIA_ATOMIC),
        "loops": loops.of_nvidia(sass),
    }


def of_amd(assembly: str) -> dict[str, Any]:
    """The same for an AMD kernel's assembly; registers are vector registers, stack_bytes is scratch memory.

    Scalar registers spill to lanes of vector registers, not to memory, and are not counted.
    """
    metadata = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    widths = Counter(loops.amd_width(name.split("_")) for name in _AMD_ACCESS.findall(assembly))
    return {
        "registers": metadata["vgpr_count"],
        "stack_bytes": metadata["private_segment_fixed_size"],
        "spills": metadata["vgpr_spill_count"],
        "mma": _count(_AMD_MATRIX.findall(assembly)),
        "share16": _share(widths),
        "atomics": _count(_AMD_ATOMIC.findall(assembly)),
        "loops": loops.of_amd(assembly),
    }


def _tool(name: str, *arguments: str | Path) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def _nvidia_width(parts: list[str]) -> int:
    """Bytes per thread; a bulk copy counts as 16."""
    if parts[0] in _NVIDIA_BULK:
        return 16
    return loops.nvidia_width(parts)


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _share(widths: Counter[int]) -> float:
    """Fraction of all statically accessed bytes that are in accesses of at least 16 bytes; 1 if there are no accesses."""
    total = sum(width * count for width, count in widths.items())
    return round(sum(width * count for width, count in widths.items() if width >= 16) / total, 4) if total else 1.0
