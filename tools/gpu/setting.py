"""The setting of a worker's checks: a GPU and real sizes, or, in a rehearsal, Triton's interpreter and tiny ones."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS = ("triton",) if REHEARSAL else ("triton", "cuda")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32} | ({} if REHEARSAL else {"fp16": torch.float16})
SIZES = ("least",) if REHEARSAL else ("tiny", "real")


def samples() -> Any:
    """The module tests/kernel_tools/samples.py. tests/ itself must not be on sys.path, where its folders would shadow packages."""
    if "kernel_tools" not in sys.modules:
        folder = ROOT / "tests" / "kernel_tools"
        spec = importlib.util.spec_from_file_location(
            "kernel_tools", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["kernel_tools"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernel_tools"])
    return importlib.import_module("kernel_tools.samples")


def doing(**what: str) -> None:
    """Prints what starts next, so that the last line of a killed process says where it hung."""
    print(json.dumps(what), flush=True)


@contextmanager
def named_launches() -> Iterator[None]:
    """Within the block Triton does the launches, and each prints its kernel's name, so that a hanging kernel can be identified."""
    from triton import knobs

    def tell(metadata: Any) -> None:
        os.write(1, f"launch {metadata.get()['name']}\n".encode())

    knobs.runtime.launch_enter_hook.add(tell)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(tell)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def capture(run: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run` and its results, after a few warm-up calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results
