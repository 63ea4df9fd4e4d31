"""Cross-compiles kernels in several processes, and caches the results by content; a change of comments or docstrings compiles nothing anew.

Results are stored in the temporary directory, or in OV3FAST_AOT_CACHE.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..lib.config import Config, pick, sizes
from . import binary, cases, loops, syntax
from .catalog import Entry
from .chips import CHIPS


@dataclass(frozen=True)
class Job:
    """One row to compute: the entry's location (file in cases/, position in its list) and how to compile it."""

    module: str
    number: int
    config: Config
    size: str
    dtype: str
    target: str


def modules() -> list[str]:
    """Module names in cases/."""
    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


@functools.cache
def entries(module: str) -> tuple[Entry, ...]:
    """The entries of a file in cases/."""
    return tuple(importlib.import_module(f"{cases.__name__}.{module}").entries())


def variants(entry: Entry, target: str) -> Iterator[tuple[str, str, Config]]:
    """(dtype, size class, config) of every launch in the table for this target, without duplicate configs."""
    seen = set()
    for dtype in entry.dtypes:
        for size in entry.sizes or sizes(entry.name):
            config = pick(entry.name, dtype, size, target)
            key = dtype, tuple(sorted(config.options.items()))
            if key not in seen:
                seen.add(key)
                yield dtype, size, config


def measure(entry: Entry, config: Config, dtype: str, target: str) -> dict[str, Any]:
    """Compiles for `target` and analyses the machine code: registers, stack_bytes, spills, shared_bytes, mma, share16, atomics, loops."""
    import triton

    chip = CHIPS[target]
    with _private_cache(), _fp32_products(target), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(_source(entry, config, dtype, target), target=_gpu(target), options=_options(config))
    found = binary.of_nvidia(compiled.asm["cubin"]) if chip.backend == "cuda" else binary.of_amd(compiled.asm["amdgcn"])
    return {**found, "shared_bytes": compiled.metadata.shared}


def _source(entry: Entry, config: Config, dtype: str, target: str) -> Any:
    """The kernel, specialised as a launch would be: pointers divisible by 16 (on AMD, within 2 GB), and so the entry's `aligned` arguments."""
    from triton.compiler import ASTSource

    if not hasattr(entry.kernel, "cache_key"):
        raise RuntimeError("ov3fast.kernels.aot can't compile under TRITON_INTERPRET=1")
    arguments = dict(entry.arguments(dtype))
    both = sorted(set(entry.constexprs) & set(config.blocks))
    if both:
        raise ValueError(f"{entry.name}: {', '.join(both)} are set by both the entry and its config")
    constexprs = {**entry.constexprs, **config.blocks}
    signature, attributes = {}, {}
    for index, parameter in enumerate(entry.kernel.params):
        name = parameter.name
        if name in arguments:
            signature[name] = arguments[name]
            if signature[name].startswith("*"):
                attributes[index,] = [["tt.divisibility", 16]] + [["tt.pointer_range", 32]] * (CHIPS[target].backend == "hip")
            elif name in entry.aligned:
                attributes[index,] = [["tt.divisibility", 16]]
            continue
        if name not in constexprs:
            if not parameter.has_default:
                raise ValueError(f"{entry.name}: neither the entry nor the config {config} sets {name}")
            constexprs[name] = parameter.default
        signature[name] = "constexpr"
    unknown = (set(arguments) | set(constexprs)) - set(signature)
    if unknown:
        raise ValueError(f"{entry.name} has no parameter {', '.join(sorted(unknown))}")
    return ASTSource(fn=entry.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    chip = CHIPS[target]
    return GPUTarget(chip.backend, chip.arch, chip.warp)


def _options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.warps, "num_stages": config.stages}


@contextmanager
def _private_cache() -> Iterator[None]:
    """Redirects Triton's own cache to a temporary folder; only the row is worth keeping."""
    import triton

    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


@contextmanager
def _fp32_products(target: str) -> Iterator[None]:
    """Sets the float32 product mode that a PyTorch built for the target would use."""
    import triton.language as tl

    from ..lib import common

    before, common.FP32_PRODUCTS = common.FP32_PRODUCTS, tl.constexpr("tf32x3" if CHIPS[target].backend == "cuda" else "ieee")
    try:
        yield
    finally:
        common.FP32_PRODUCTS = before


# ---- in parallel, with a cache ----------------------------------------------------------------------------------------


def measure_all(todo: Sequence[Job], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, result) of all jobs, cached ones first."""
    missing = []
    for index, job in enumerate(todo):
        try:
            path = _remembered(job)
        except ValueError as reason:
            yield index, {"error": str(reason)}
            continue
        if path.exists():
            yield index, json.loads(path.read_text())
        else:
            missing.append(index)
    if jobs <= 1 or len(missing) < 2:
        yield from ((index, run(todo[index])) for index in missing)
        return
    # Spawned: a forked process would inherit locks held by threads that it does not have.
    with ProcessPoolExecutor(min(jobs, len(missing)), multiprocessing.get_context("spawn")) as pool:
        yield from zip(missing, pool.map(run, [todo[index] for index in missing]), strict=True)


def run(job: Job) -> dict[str, Any]:
    """Measures a job and caches the result; if the kernel does not compile, the error."""
    try:
        path = _remembered(job)
        found = measure(entries(job.module)[job.number], job.config, job.dtype, job.target)
    except Exception as reason:
        return {"error": f"{type(reason).__name__}: {reason}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return found


def _remembered(job: Job) -> Path:
    """Cache file of the job, keyed by what the kernel and everything it calls compute, its arguments, the target and the tools."""
    import triton

    source = _source(entries(job.module)[job.number], job.config, job.dtype, job.target)
    tools = triton.__version__, *(syntax.of_source(inspect.getsource(tool)) for tool in (binary, loops, measure))
    constants = {
        key: syntax.of_kernel(value) if hasattr(value, "cache_key") else str(value)
        for key, value in sorted(source.constants.items())
    }
    what = syntax.of_kernel(source.fn), source.attrs, source.signature, constants, _options(job.config), job.target, tools
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    folder = os.environ.get("OV3FAST_AOT_CACHE") or Path(tempfile.gettempdir(), f"ov3fast-aot-{os.getuid()}")
    return Path(folder, f"{key}.json")
