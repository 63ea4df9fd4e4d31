"""Interleaved timing, memory growth, and the machine's peak rates, all measured in one process."""

from __future__ import annotations

import ctypes
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ov3fast.ops import _trials

LONG = 15.0
"""A single variant whose first run takes longer than this many seconds is not run again."""


def interleaved(
    variants: dict[str, Callable[[], object]], budget: float, least: int = 5, most: int = 4000, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every run of each variant, interleaved, after one warm-up run, for about `budget` seconds.

    Each round has its own random order, the same in every process: what runs before a variant decides the state of caches and allocator, and the
    same call in two fixed places of the order differed by up to 7 %. pause: seconds before
    each run, for variants whose idle threads spin and would take a core from the next one.
    """
    _trials.settle()
    first = {name: _seconds(run) for name, run in variants.items()}
    if max(first.values()) > LONG and len(variants) == 1:
        return {name: [seconds] for name, seconds in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    began = time.perf_counter()
    turns = 0
    while turns < least or (time.perf_counter() - began < budget and turns < most):
        for name in order.sample(list(variants), len(variants)):
            time.sleep(pause)
            seconds[name].append(_seconds(variants[name]))
        turns += 1
    return seconds


def once(run: Callable[[], object]) -> float:
    """Seconds taken by the second run."""
    run()
    return _seconds(run)


def _seconds(run: Callable[[], object]) -> float:
    if device() == "cuda":
        return _seconds_on_gpu(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_gpu(run: Callable[[], object]) -> float:
    """Measured between events on the stream, with a cold cache; launches are queued while the cache is being overwritten."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(2**28, dtype=torch.int8).zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def device() -> str:
    """ "cpu" or "cuda": the current default device."""
    return torch.get_default_device().type


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    return tuple(statistics.quantiles(seconds, n=4, method="inclusive")) if len(seconds) > 1 else (seconds[0],) * 3


def extra_memory(run: Callable[[], object]) -> float | None:
    """Peak growth in MB of the process (or the GPU's memory) during `run`, including its results; None if the system can't tell."""
    if device() == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        return None

    def kilobytes(field: str) -> int:
        return int(status.read_text().split(field + ":")[1].split()[0])

    before = kilobytes("VmRSS")
    kept = run()
    peak = kilobytes("VmHWM")
    del kept
    return max(0, peak - before) / 1000


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the best square matrix product, PyTorch's or ours."""
    from ov3fast import ops

    size = 8192 if device() == "cuda" else 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    runs = interleaved({"torch": lambda: a @ b.T, "ours": lambda: ops.linear(a, b)}, budget=2.0)
    return 2 * size**3 / min(statistics.median(seconds) for seconds in runs.values())


def copy_rate(size: int = 2**26) -> float:
    """Bytes/s, read plus written, of a copy too large for the caches."""
    a, b = torch.zeros(size), torch.ones(size)
    return 2 * 4 * size / statistics.median(interleaved({"copy": lambda: b.copy_(a)}, budget=2.0)["copy"])


def commit() -> str:
    """The source tree's commit; "unknown" without git or a repository."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, str]:
    """The columns that describe the machine in every results table."""
    from ov3fast.ops import _chip, cpu

    if device() == "cuda":
        return {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "torch": torch.__version__,
            "commit": commit(),
        }
    chip = _chip.current()
    return {
        "cpu": chip.model,
        "isa": cpu.isa() if cpu.unavailable_reason() is None else "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": commit(),
        "chip": chip.name,
    }
