"""Attention: each kernel by head dimension, with and without a causal mask."""

from __future__ import annotations

import functools

from ...attention.backward import flash_attention_grad_kv, flash_attention_grad_q
from ...attention.forward import flash_attention_forward
from ...attention.tiles import constexprs, parts, size_class, step
from ...lib.common import cdiv
from ...lib.config import ARCHITECTURES, WITH_TMA, Config
from ..catalog import SIZES, Entry, Work, argument_types


def traffic(
    kernel: str,
    dtype: str,
    config: Config,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    causal: bool,
    prefix_len: int,
) -> int:
    """Bytes that a launch moves. Data read by several programs counts every time; most of it comes from the L2 cache."""
    block_queries, block_keys = config.blocks["BLOCK_QUERIES"], config.blocks["BLOCK_KEYS"]
    row = head_dim * SIZES[dtype]
    numbers = 4 * (3 if dtype == "fp32" else 2)  # per query in the backward: lse, delta and, for fp32, weight
    # A product over columns that proceeds in steps loads both operands again; the other products load their own.
    again = int(step(head_dim, dtype) > 0)

    def visible(query: int) -> int:
        return min(max(query + 1 + keys - queries, prefix_len, 0), keys) if causal else keys

    total = 0
    if kernel.endswith("grad_kv"):
        for start in range(0, keys, block_keys):
            block = min(block_keys, keys - start)
            total += (4 - 2 * again) * row * block
            for query in range(0, queries, block_queries):
                end = min(query + block_queries, queries)
                if visible(end - 1) > start:
                    total += ((2 + 2 * again) * row + numbers) * (end - query) + 2 * again * row * block
        return total * batch * heads
    for query in range(0, queries, block_queries):
        end = min(query + block_queries, queries)
        blocks = cdiv(visible(end - 1), block_keys)
        seen = min(blocks * block_keys, keys)
        if kernel.endswith("grad_q"):
            total += (2 + again) * row * seen + row * min(block_keys, keys)
            total += ((4 - again + 2 * again * blocks) * row + numbers) * (end - query)
        else:
            total += 2 * row * seen + ((2 - again + again * blocks) * row + 4) * (end - query)
    return total * batch * heads


# Products over head_dim per visible (query, key) pair.
_PRODUCTS = {"flash_attention_forward": 2, "flash_attention_grad_q": 3, "flash_attention_grad_kv": 4}
# Tensors with one row per query or key: q, k, v, out; plus grad_out and grad_q; without out, and grad_k and grad_v instead of grad_q.
_TENSORS = {"flash_attention_forward": 4, "flash_attention_grad_q": 6, "flash_attention_grad_kv": 6}
_BATCH, _LENGTH, _HEADS = 8, 1024, 16


def _work(kernel: str, head_dim: int, causal: bool, dtype: str, config: Config) -> Work:
    """Counts full tiles, including the padding of the head dimension."""
    block_queries, block_keys = config.blocks["BLOCK_QUERIES"], config.blocks["BLOCK_KEYS"]
    whole, border = cdiv(_LENGTH, block_queries) * cdiv(_LENGTH, block_keys), 0
    if causal:
        # Per block of queries: the blocks of keys visible to all of them, and those visible to some.
        starts = range(0, _LENGTH, block_queries)
        whole = sum(start // block_keys for start in starts)
        border = sum(cdiv(start + block_queries, block_keys) for start in starts) - whole
    tiles = whole + border
    columns = sum(parts(head_dim, dtype))
    flops = 2 * _PRODUCTS[kernel] * columns * tiles * block_queries * block_keys * _BATCH * _HEADS
    programs = cdiv(_LENGTH, block_keys if kernel.endswith("grad_kv") else block_queries)
    rows = _BATCH * _HEADS * _LENGTH
    return Work(
        flops,
        traffic(kernel, dtype, config, _BATCH, _LENGTH, _LENGTH, _HEADS, head_dim, causal, 0),
        programs * _BATCH * _HEADS,
        distinct=rows * (_TENSORS[kernel] * head_dim * SIZES[dtype] + (4 if kernel.endswith("forward") else 8)),
        trips=(tiles / programs,),
        # Blocks on the mask's border come first in the loop over queries and last in the loop over keys.
        shares=(border, whole) if kernel.endswith("grad_kv") else (whole, border),
    )


_SETUP = "TMA descriptor setup"


def _entry(kernel, head_dim: int, causal: bool, dtypes: tuple[str, ...], way: str = "") -> Entry:
    """way: suffix of the size class to compile with, "tma" or "warp-specialized"."""
    tensors = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
    positive = {"POSITIVE": True} if kernel is flash_attention_forward else {}
    return Entry(
        kernel=kernel,
        op="flash_attention",
        arguments=argument_types(
            kernel, **dict.fromkeys(tensors, "*{}"), lse="*fp32", delta="*fp32", weight="*fp32", scale="fp32", grad_scale="fp32"
        ),
        problem=f"{_BATCH} x {_LENGTH} queries and keys, {_HEADS} heads of {head_dim}",
        work=functools.partial(_work, kernel.__name__, head_dim, causal),
        constexprs=constexprs(head_dim, dtypes[0], causal, True) | positive,
        variant=" ".join(filter(None, (f"D={head_dim}", "causal" if causal else "", way))),
        dtypes=dtypes,
        targets=WITH_TMA if way else ARCHITECTURES,
        sizes=(f"{size_class(head_dim)} {way}".rstrip(),),
        matrix=True,
        exceptions={"atomics": _SETUP} if way else {},
    )


def entries() -> list[Entry]:
    """Each kernel at the models' head dimensions, causal and not, and at one per remaining size class; the forward also with TMA."""
    cases = [(head_dim, causal) for head_dim in (64, 72, 80, 128) for causal in (False, True)]
    kernels = (flash_attention_forward, flash_attention_grad_q, flash_attention_grad_kv)
    through_tma = [
        _entry(flash_attention_forward, *case, ("bf16", "fp16"), way) for way in ("tma", "warp-specialized") for case in cases
    ]
    cases += [(head_dim, True) for head_dim in (96, 192, 256)]
    plain = [_entry(kernel, *case, dtypes) for kernel in kernels for case in cases for dtypes in (("bf16", "fp16"), ("fp32",))]
    return plain + through_tma
