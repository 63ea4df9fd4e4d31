"""Checks one operator on the GPU: python -m tools.gpu.correct ROWS BACKEND OPERATOR; "descriptors" checks attention's variants that only tuning enables.

Checks: errors, as a ratio to the budget of ov3fast.testing; the same call gives the same bits five times, launched by Triton the first time and then by
our launcher; a captured call equals an eager one.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ov3fast import ops, testing

from .rows import Rows
from .setting import DEVICE, DTYPES, REHEARSAL, SIZES, capture, doing, named_launches, samples, synchronize

REPEATS = 2 if REHEARSAL else 5
WAYS = ("tma", "warp-specialized")
"""Variant suffixes of size classes in attention's configurations."""


class Checks:
    """Runs checks independently, each writing its own rows."""

    def __init__(self, rows: Rows, backend: str):
        self.rows, self.backend = rows, backend

    def run(self, name: str, check: str, call: Callable[[], Iterator[dict[str, Any]]], **where: str) -> None:
        """`call` yields additional fields of its rows. Re-raises errors after which further calls are pointless, since CUDA errors are sticky."""
        doing(operator=name, check=check, backend=self.backend, **where)
        more = dict(backend=self.backend, **where)
        try:
            for facts in call():
                status = "ok" if facts.get("ratio", 0.0) <= 1 else "over"
                self.rows.write(name, check, status, **{**more, **facts})
        except Exception as reason:
            self.rows.write(name, check, "failed", **more, detail=f"{traceback.format_exc(limit=-4)}")
            if "CUDA error" in str(reason) or isinstance(reason, torch.AcceleratorError):
                raise

    def sample(self, sample: Any, size: str, dtype: str) -> None:
        shape = "x".join(map(str, sample.sizes[size]))
        with ops.use(self.backend):
            self.run(sample.name, "parity", lambda: parity(sample, size, dtype), dtype=dtype, size=shape)
            self.run(sample.name, "same bits", lambda: same_bits(sample, size, dtype), dtype=dtype, size=shape)
            if not REHEARSAL:
                self.run(sample.name, "captured", lambda: captured(sample, size, dtype), dtype=dtype, size=shape)


def parity(sample: Any, size: str, dtype: str) -> Iterator[dict[str, Any]]:
    """The worst ratio over the outputs, and over the gradients."""
    inputs = sample.inputs(size, DTYPES[dtype], DEVICE)
    upstream = sample.upstream(inputs, sample.plain)
    budget = testing.Budget(lambda values: sample.results(values, sample.plain, upstream), inputs)
    with named_launches():
        results = sample.results(inputs, upstream=upstream)
    ratios = budget.ratios(results)
    outputs = len(upstream) if sample.call.differentiable else len(ratios)
    for direction, some in (("forward", ratios[:outputs]), ("backward", ratios[outputs:])):
        if some:
            yield {"direction": direction, "ratio": round(max(some), 4)}


def same_bits(sample: Any, size: str, dtype: str) -> Iterator[dict[str, Any]]:
    inputs = sample.inputs(size, DTYPES[dtype], DEVICE)
    upstream = sample.upstream(inputs)
    with named_launches():
        expected = sample.results(inputs, upstream=upstream)
    for _ in range(REPEATS - 1):
        testing.assert_same_bits(sample.results(inputs, upstream=upstream), expected)
    yield {"direction": "both", "times": REPEATS}


def captured(sample: Any, size: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Replays the graph with other values in the same memory."""
    inputs = sample.inputs(size, DTYPES[dtype], DEVICE)
    upstream = sample.upstream(inputs)
    graph, results = capture(lambda: sample.results(inputs, upstream=upstream))
    for value in inputs:
        if value.is_floating_point() and value.ndim:
            value.copy_(value.flip(0))
    graph.replay()
    synchronize()
    testing.assert_same_bits(results, sample.results(inputs, upstream=upstream))
    yield {"direction": "both"}


def descriptors(checks: Checks) -> None:
    """The variants of attention's forward that `ov3fast tune` may enable."""
    from ov3fast.kernels.attention.tiles import size_class
    from ov3fast.kernels.lib import config as configs
    from ov3fast.ops.flash_attention import reference

    architecture = configs.current_architecture()
    name, batch, tokens, heads = "flash_attention_forward", *((1, 40, 1) if REHEARSAL else (2, 1000, 4))

    def way_of(way: str, width: int, causal: bool, dtype: str) -> Iterator[dict[str, Any]]:
        size = size_class(width)
        row = configs.pick(name, dtype, f"{size} {way}", architecture if architecture in configs.WITH_TMA else "sm_90")
        qkv = testing.make(batch, tokens, 3, heads, width).to(DEVICE, DTYPES[dtype])
        with nullcontext() if REHEARSAL else configs.trying({(name, dtype, size): row}):
            ours = [torch.ops.ov3fast.flash_attention_qkvpacked(qkv, causal, 0, width**-0.5, "triton") for _ in range(REPEATS)]
            synchronize()
        budget = testing.Budget(lambda values: [reference(*values[0].unbind(2), causal=causal)], [qkv])
        for other in ours[1:]:
            testing.assert_same_bits(other, ours[0])
        yield {"direction": "forward", "ratio": round(budget.ratios([ours[0][0]])[0], 4)}

    for way in WAYS:
        for width in (64, 72, 128):
            for causal in (False, True):
                where = dict(dtype="bf16", size=f"D={width}{' causal' * causal}")
                checks.run("flash_attention", way, lambda w=way, d=width, c=causal: way_of(w, d, c, "bf16"), **where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("backend")
    parser.add_argument("operator")
    options = parser.parse_args()
    checks, module = Checks(Rows(options.rows), options.backend), samples()
    if options.operator == "descriptors":
        with named_launches():
            descriptors(checks)
        return
    for size in SIZES:
        for dtype in DTYPES:
            for sample in module.SAMPLES:
                if sample.op == options.operator and sample.takes(options.backend, DTYPES[dtype]):
                    checks.sample(sample, size, dtype)
    for sample in module.ACROSS_CHUNKS if options.backend == "triton" else []:
        if sample.op == options.operator:
            checks.sample(sample, "tiny" if REHEARSAL else "real", "bf16")


if __name__ == "__main__":
    main()
