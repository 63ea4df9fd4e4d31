"""What compile.py and table.py need to know of a kernel: how to compile it without a GPU, and how much work a launch is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..lib.common import cdiv
from ..lib.config import ARCHITECTURES, Config

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element, by those names."""


@dataclass(frozen=True)
class Work:
    """What one launch does at the entry's problem size."""

    flops: float
    """Arithmetic; of matrix products that of whole tiles, as the tensor cores do it."""
    bytes: float
    """What its programs read and write, what they read from a cache included."""
    programs: int
    """Programs of the launch."""
    distinct: float | None = None
    """Bytes where each tensor counts once; `bytes`, if None."""
    streamed: float = 0
    """Of these, what every wave of programs reads from end to end: beyond the L2 cache it comes from the HBM each time."""
    trips: tuple[float, ...] = ()
    """How often loops turn, the outermost first. Those of innermost loops count only where the machine code's products can't be counted."""

    shares: tuple[float, ...] = ()
    """How their turns divide among innermost loops that follow each other, in the order of the text; equally, if empty."""

    @property
    def once(self) -> float:
        return self.bytes if self.distinct is None else self.distinct


@dataclass(frozen=True)
class Entry:
    """One kernel with one set of fixed constexprs; aot compiles it with each of its configs, for each of its dtypes."""

    kernel: Any
    """The @triton.jit function."""
    op: str
    """Name of the operator in ov3fast.ops."""
    arguments: Callable[[str], Mapping[str, str]]
    """dtype ("fp32", "bf16", "fp16") -> type of each argument that is no constexpr, in order: {"x": "*bf16", "rows": "i32", ...}."""
    problem: str
    """The size that `work` counts, in words: "2048 x 768"."""
    work: Callable[[str, Config], Work]
    """(dtype, row of configuration) -> work at that size."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """Constexprs that the configs do not set."""
    variant: str = ""
    """Tells apart entries of one kernel: "causal", "D=72"."""
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    targets: tuple[str, ...] = ARCHITECTURES
    aligned: tuple[str, ...] = ()
    """Arguments that are divisible by 16 at that size, besides all pointers, as Triton would find at run time."""
    matrix: bool = False
    """Whether it multiplies matrices: tensor-core instructions must be there (for 16-bit dtypes)."""
    streaming: bool = False
    """Whether memory bounds it: its global accesses must be 16 bytes wide."""
    sizes: tuple[str, ...] = ()
    """Size classes of TABLE that it is launched with; all that the kernel's rows name, if empty."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """What aot's gate lets pass -> why, which the table shows. Keys: stack, spills, shared, wide, tensor cores, atomics; for some rows only
    with the target, the dtype or both behind: "spills@sm_80", "wide@bf16", "spills@sm_80/fp32"."""

    def excuse(self, gate: str, target: str, dtype: str) -> str | None:
        """Why the gate does not hold for this target and dtype, or None."""
        keys = (gate, f"{gate}@{target}", f"{gate}@{dtype}", f"{gate}@{target}/{dtype}")
        return next((self.exceptions[key] for key in keys if key in self.exceptions), None)

    @property
    def name(self) -> str:
        """Name in TABLE: the function's, without underscores in front."""
        return self.kernel.__name__.lstrip("_")


def argument_types(kernel, **types: str):
    """dtype -> type of each argument of `kernel` that is no constexpr: its word in `types`, where {} is the dtype; else "i32"."""

    def of(dtype: str) -> dict[str, str]:
        return {p.name: types.get(p.name, "i32").format(dtype) for p in kernel.params if not p.is_constexpr}

    return of


def row_types(name: str, dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments for rows with one stride, for its Entry; `row_constants` gives the remaining one."""
    return {name: f"*{dtype}", f"{name}_outer_stride": "i32", f"{name}_inner_stride": "i32"}


def row_constants(*names: str) -> dict[str, int]:
    return {f"{name}_inner": 1 for name in names}


def row_alignment(*names: str) -> tuple[str, ...]:
    """Of these arguments, those that are divisible by 16 at common widths."""
    return tuple(f"{name}_{axis}_stride" for name in names for axis in ("outer", "inner"))


def product_bytes(m: int, n: int, k: int, size: int, weight_size: int, block_m: int, block_n: int) -> float:
    """Global loads of both operands, each tile reading its own: L2 serves the repetitions, DRAM the first."""
    return cdiv(n, block_n) * m * k * size + cdiv(m, block_m) * n * k * weight_size
