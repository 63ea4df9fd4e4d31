"""Describes a kernel to compile.py and table.py: how to compile it without a GPU, and how much work a launch does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..lib.common import cdiv
from ..lib.config import ARCHITECTURES, Config

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per element."""


@dataclass(frozen=True)
class Work:
    """What one launch does at the entry's problem size."""

    flops: float
    """Arithmetic operations; matrix products count full tiles, as the tensor cores execute them."""
    bytes: float
    """Bytes that its programs read and write, including reads from cache."""
    programs: int
    """Number of programs."""
    distinct: float | None = None
    """Bytes with each tensor counted once; None: same as `bytes`."""
    streamed: float = 0
    """The part of `distinct` that every wave of programs reads from end to end; if it exceeds the L2 cache, it comes from HBM each time."""
    trips: tuple[float, ...] = ()
    """Loop trip counts, outermost first. Those of innermost loops are used only if the machine code has no products to count."""

    shares: tuple[float, ...] = ()
    """How iterations are distributed over consecutive innermost loops, in program order; equally, if empty."""

    @property
    def once(self) -> float:
        return self.bytes if self.distinct is None else self.distinct


@dataclass(frozen=True)
class Entry:
    """One kernel with one set of fixed constexprs, to be compiled with each of its configurations and dtypes."""

    kernel: Any
    """The @triton.jit function."""
    op: str
    """Name of the operator in ov3fast.ops."""
    arguments: Callable[[str], Mapping[str, str]]
    """dtype ("fp32", "bf16", "fp16") -> type of each non-constexpr argument, in order: {"x": "*bf16", "rows": "i32", ...}."""
    problem: str
    """The problem size that `work` assumes, as text: "2048 x 768"."""
    work: Callable[[str, Config], Work]
    """(dtype, configuration) -> work at that size."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """Constexprs that the configurations do not set."""
    variant: str = ""
    """Distinguishes entries of the same kernel: "causal", "D=72"."""
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    targets: tuple[str, ...] = ARCHITECTURES
    aligned: tuple[str, ...] = ()
    """Integer arguments divisible by 16 at that size, as Triton would specialise them at run time; pointers always are."""
    matrix: bool = False
    """Whether it multiplies matrices; 16-bit dtypes must then use tensor-core instructions."""
    streaming: bool = False
    """Whether it is memory-bound; its global accesses must then be 16 bytes wide."""
    sizes: tuple[str, ...] = ()
    """Size classes of TABLE to compile; if empty, all that the kernel's rows name."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Waived check -> reason, which the table shows. Keys: stack, spills, shared, wide, tensor cores, atomics; optionally restricted to a
    target, a dtype or both: "spills@sm_80", "wide@bf16", "spills@sm_80/fp32"."""

    def excuse(self, gate: str, target: str, dtype: str) -> str | None:
        """The reason why the check is waived for this target and dtype, or None."""
        keys = (gate, f"{gate}@{target}", f"{gate}@{dtype}", f"{gate}@{target}/{dtype}")
        return next((self.exceptions[key] for key in keys if key in self.exceptions), None)

    @property
    def name(self) -> str:
        """Name in TABLE: the function's name without leading underscores."""
        return self.kernel.__name__.lstrip("_")


def argument_types(kernel, **types: str):
    """dtype -> type of each non-constexpr argument of `kernel`: from `types`, with {} replaced by the dtype, else "i32"."""

    def of(dtype: str) -> dict[str, str]:
        return {p.name: types.get(p.name, "i32").format(dtype) for p in kernel.params if not p.is_constexpr}

    return of


def row_types(name: str, dtype: str) -> dict[str, str]:
    """Types of the arguments that describe rows with one stride; `row_constants` gives the remaining one."""
    return {name: f"*{dtype}", f"{name}_outer_stride": "i32", f"{name}_inner_stride": "i32"}


def row_constants(*names: str) -> dict[str, int]:
    return {f"{name}_inner": 1 for name in names}


def row_alignment(*names: str) -> tuple[str, ...]:
    """Those of these arguments that are divisible by 16 at common widths."""
    return tuple(f"{name}_{axis}_stride" for name in names for axis in ("outer", "inner"))


def product_bytes(m: int, n: int, k: int, size: int, weight_size: int, block_m: int, block_n: int) -> float:
    """Global loads of both operands by all tiles: the first read comes from DRAM, repeated ones from L2."""
    return cdiv(n, block_n) * m * k * size + cdiv(m, block_m) * n * k * weight_size
