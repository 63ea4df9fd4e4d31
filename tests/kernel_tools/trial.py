"""Small kernels for testing the tools: a scaled copy, a matrix product, and some deliberately bad ones."""

from dataclasses import replace

import triton
import triton.language as tl

from ov3fast.kernels.aot.catalog import Entry, Work
from ov3fast.kernels.lib.common import dot


@triton.jit
def _scaled_copy(x, y, count, factor, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offset, mask=offset < count, other=0)
    tl.store(y + offset, (value.to(tl.float32) * factor).to(y.dtype.element_ty), mask=offset < count)


@triton.jit
def _product(a, b, c, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c [m, n] = a [m, k] b [k, n], all contiguous."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = tl.load(a + rows[:, None] * k + inner[None, :], mask=(rows < m)[:, None] & (inner < k)[None, :], other=0)
        right = tl.load(b + inner[:, None] * n + columns[None, :], mask=(inner < k)[:, None] & (columns < n)[None, :], other=0)
        total = dot(left, right, total)
    tl.store(
        c + rows[:, None] * n + columns[None, :],
        total.to(c.dtype.element_ty),
        mask=(rows < m)[:, None] & (columns < n)[None, :],
    )


@triton.jit
def _every_second(x, y, count, BLOCK: tl.constexpr):
    """Reads and writes every second element, so that no access is wide."""
    offset = 2 * (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y + offset, tl.load(x + offset, mask=offset < count, other=0), mask=offset < count)


@triton.jit
def _sum_by_atomics(x, y, count, BLOCK: tl.constexpr):
    """Its sum depends on the order of programs."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + offset, mask=offset < count, other=0).to(tl.float32)))


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def entries() -> list[Entry]:
    return [
        Entry(
            _scaled_copy, "trial", lambda dtype: {"x": f"*{dtype}", "y": f"*{dtype}", "count": "i32", "factor": "fp32"},
            "2^20", lambda dtype, config: Work(2**20, 2 * 2**20 * BYTES[dtype], 2**20 // config.blocks["BLOCK"]), aligned=("count",), streaming=True,
        ),
        Entry(
            _product, "trial", lambda dtype: {"a": f"*{dtype}", "b": f"*{dtype}", "c": f"*{dtype}", "m": "i32", "n": "i32", "k": "i32"},
            "1024 x 1024 x 1024", lambda dtype, config: Work(2 * 1024**3, 3 * 1024**2 * BYTES[dtype], 256), aligned=("m", "n", "k"), matrix=True,
        ),
        Entry(
            _every_second, "trial", lambda dtype: {"x": f"*{dtype}", "y": f"*{dtype}", "count": "i32"},
            "2^20", lambda dtype, config: Work(0, 2**20 * BYTES[dtype], 1024), aligned=("count",), streaming=True,
        ),
        Entry(
            _sum_by_atomics, "trial", lambda dtype: {"x": f"*{dtype}", "y": "*fp32", "count": "i32"},
            "2^20", lambda dtype, config: Work(2**20, 2**20 * BYTES[dtype], 1024), aligned=("count",),
        ),
    ]  # fmt: skip


def excused(entry: Entry, exceptions: dict[str, str]) -> Entry:
    return replace(entry, exceptions=exceptions)
