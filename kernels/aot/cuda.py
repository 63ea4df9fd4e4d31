"""Rows for the CUDA C++ kernels of csrc/cuda, compiled with nvcc for each chip; table.py appends them to its own.

The formulas count every access of every thread, including those served from a cache.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import loops
from .catalog import Work
from .chips import CHIPS
from .estimate import estimate

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
"""Exists only in a source tree."""

WARPS = 8
"""Warps per block; ops/cuda launches blocks of 256 threads."""
ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}
SIZES = {"f32": 4, "bf16": 2, "f16": 2}
NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


def adamw_ema_work(elements: int, chunks: int, parts: int, param: int, grad: int, ema: bool = True) -> dict[str, Work]:
    """Step -> work, for params and grads of these sizes in bytes, in `chunks` blocks that each read `parts` partial sums."""
    moved = 2 * param + grad + 4 * (6 if ema else 4)
    return {
        "squares": Work(2 * elements, grad * elements + 4 * parts, parts),
        "update": Work(20 * elements, moved * elements + 4 * parts * chunks, chunks, moved * elements + 4 * parts),
    }


def group_norm_silu_work(
    *, B: int, C: int, S: int, G: int, N: int, strips: int, columns: int, item: int, weight: int
) -> dict[str, Work]:
    """Step -> work, for elements of `item` bytes and parameters of `weight` bytes; the rest as in Plan of ops/cuda/group_norm_silu.py."""
    elements, parts, groups, per_group = B * C * S, 8 * B * strips * C, B * G, C // G
    in_pack = 1 if per_group % N == 0 else N // per_group
    threads, blocks = B * strips * (256 // columns) * (C // N), B * strips * -(-C // (N * columns))

    def constants(statistics: int) -> int:
        """What threads read up front: weight and bias of their channels, and statistics of their groups."""
        return threads * (2 * N * weight + 4 * statistics * in_pack)

    def each(flops: float, bytes: float, statistics: int) -> Work:
        """One pass over x: all threads of a channel but the first read its constants from cache."""
        return Work(flops, bytes + constants(statistics), blocks, bytes + 2 * C * weight + 4 * statistics * groups)

    return {
        "moments": Work(6 * elements, item * elements + parts, blocks),
        "merge": Work(0, 1.5 * parts + 8 * groups, groups),
        "apply": each(8 * elements, 2 * item * elements, 2),
        "sums": each(16 * elements, 2 * item * elements + parts, 2),
        "totals": Work(0, parts + 8 * B * C, B * -(-2 * C // 32)),
        "finish": Work(0, B * C * (8 + 8 + weight) + 8 * groups + 2 * C * weight, -(-groups // 8) + -(-C // 256)),
        "grad": each(20 * elements, 3 * item * elements, 4),
    }


@dataclass(frozen=True)
class Kernel:
    name: str
    op: str
    variant: str
    dtype: str
    problem: str
    work: Work


def kernels() -> Iterator[Kernel]:
    """Every kernel of csrc/cuda, at the table's problem size."""
    elements = 304_000_000
    for param, grad in (("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")):
        work = adamw_ema_work(elements, elements // 8192, 1024, SIZES[param], SIZES[grad])
        about = (
            "adamw_ema_",
            f"{NAMES[grad]} gradients" if param != grad else "",
            NAMES[param],
            "304 M parameters, in full chunks",
        )
        yield Kernel(f"ov3_adamw_ema_update_{param}_{grad}", *about, work["update"])
        if param == grad:
            yield Kernel(f"ov3_adamw_ema_squares_{grad}", *about, work["squares"])
    for suffix in SIZES:
        for single in (False, True):
            N = 1 if single else 16 // SIZES[suffix]
            sizes = dict(B=4, C=128, S=256 * 256, G=32, N=N, strips=256, columns=128 // N)
            about = (
                "group_norm_silu",
                "channels_last, single elements" if single else "channels_last",
                NAMES[suffix],
                "4 x 128 x 256 x 256",
            )
            for step, work in group_norm_silu_work(**sizes, item=SIZES[suffix], weight=4).items():
                if step in ("merge", "totals") and suffix == "f32" and not single:
                    yield Kernel(f"ov3_group_norm_silu_{step}", *about, work)
                elif step not in ("merge", "totals") and not (step == "finish" and single):
                    yield Kernel(f"ov3_group_norm_silu_{step}_{suffix}{'_single' if single else ''}", *about, work)


def find_nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def rows(targets: Sequence[str] = tuple(ARCHITECTURES)) -> list[dict[str, Any]]:
    """One row per kernel and target, with the keys of the table; none without nvcc or the sources."""
    if find_nvcc() is None or not SOURCES.is_dir():
        return []
    table = []
    for target in targets:
        if target not in ARCHITECTURES:
            continue
        compiled = {name: found for source in sorted(SOURCES.glob("*.cu")) for name, found in measure(source, target).items()}
        table += [_row(kernel, target, compiled.pop(kernel.name)) for kernel in kernels()]
        if compiled:
            raise KeyError(f"aot.cuda: kernels() does not list {', '.join(sorted(compiled))}")
    return table


def _row(kernel: Kernel, target: str, found: dict[str, Any]) -> dict[str, Any]:
    terms = estimate(kernel.work, CHIPS[target], kernel.dtype, False, WARPS, found)
    lacks = [f"{what}: {found[what]}" for what in ("stack_bytes", "spills") if found[what]]
    return {
        "kernel": kernel.name, "op": kernel.op, "variant": kernel.variant, "config": "CUDA C++, 256 threads", "dtype": kernel.dtype,
        "target": target, **found, "mma": {}, "problem": kernel.problem, "flops": kernel.work.flops, "bytes": kernel.work.once,
        **terms, "shortcomings": "; ".join(lacks),
    }  # fmt: skip


@functools.cache
def measure(source: Path, target: str) -> dict[str, dict[str, Any]]:
    """kernel -> registers, stack_bytes, spills, shared_bytes (from ptxas), share16 and loops (from the machine code).

    Raises RuntimeError with nvcc's output if compilation fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [
            find_nvcc(),
            "-cubin",
            "-std=c++17",
            "-O3",
            f"-arch={ARCHITECTURES[target]}",
            "-Xptxas",
            "-v",
            str(source),
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stderr}")
        code = _machine_code(cubin)
    result = {}
    for part in done.stderr.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        numbers = {
            what: int(re.search(rf"(\d+) {what}", part)[1])
            for what in ("bytes stack frame", "bytes spill stores", "bytes spill loads")
        }
        shared = re.search(r"(\d+) bytes smem", part)
        result[name] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "stack_bytes": numbers["bytes stack frame"],
            # ptxas counts bytes, 4 per instruction.
            "spills": (numbers["bytes spill stores"] + numbers["bytes spill loads"]) // 4,
            "shared_bytes": int(shared[1]) if shared else 0,
            "share16": _share16(code[name]),
            "loops": loops.of_nvidia(code[name]),
        }
    return result


def _machine_code(cubin: Path) -> dict[str, str]:
    """kernel -> its instructions."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return {re.match(r"\w+", section)[0]: section for section in re.split(r"\.section\s+\.text\.", text)[1:]}


def _share16(code: str) -> float:
    """Fraction of all statically accessed global bytes that are in accesses of at least 16 bytes; 1 if there are no accesses."""
    widths = [_width(opcode) for opcode in re.findall(r"\b((?:LDG|STG)\.[\w.]+)", code)]
    return round(sum(w for w in widths if w >= 16) / sum(widths), 4) if widths else 1.0


def _width(opcode: str) -> int:
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return max((widths[part] for part in opcode.split(".") if part in widths), default=4)
