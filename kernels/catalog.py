"""Descriptions of kernels: what `aot.py` needs to compile one for any chip without a GPU, and to count its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .configs import ARCHITECTURES


@dataclass(frozen=True)
class Work:
    """Arithmetic and global memory traffic of one launch at the entry's problem size."""

    flops: float
    bytes: float


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
    work: Callable[[str], Work]
    """dtype -> work at that size."""
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
    """Size classes of configs.TABLE that it is launched with; all that the kernel's rows name, if empty."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """What aot's gate lets pass -> why, which the table shows. Keys: stack, spills, shared, wide, tensor cores, atomics; for some rows only
    with the target, the dtype or both behind: "spills@sm_80", "wide@bf16", "spills@sm_80/fp32"."""

    def excuse(self, gate: str, target: str, dtype: str) -> str | None:
        """Why the gate does not hold for this target and dtype, or None."""
        keys = (gate, f"{gate}@{target}", f"{gate}@{dtype}", f"{gate}@{target}/{dtype}")
        return next((self.exceptions[key] for key in keys if key in self.exceptions), None)

    @property
    def name(self) -> str:
        """Name in configs.TABLE: the function's, without underscores in front."""
        return self.kernel.__name__.lstrip("_")
