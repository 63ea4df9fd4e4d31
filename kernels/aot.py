"""Compiles every kernel with every row of its table for every chip, without a GPU, and tells what came out.

    python -m ov3fast.kernels.aot --target sm_90 sm_100 --op flash_attention --csv table.csv --json table.json

A row of the table is one kernel x config x dtype x target: registers, stack, spills, shared memory, matrix instructions and the share of 16-byte
accesses as the machine code has them, the work of one launch as the kernel's entry counts it, and the time that it takes at the chip's peak
rates. `shortcomings` is the gate: what a row lacks. Results are kept by content in the temporary directory; OV3FAST_AOT_CACHE names another.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import binary, configs
from .catalog import Entry
from .chips import CHIPS
from .configs import Config

WIDE = 0.75
"""Least share of a streaming kernel's static global bytes that must move in 16-byte accesses; the rest is statistics and the like."""

COLUMNS = (
    "kernel", "op", "variant", "size", "config", "dtype", "target", "registers", "stack_bytes", "spills", "shared_bytes", "mma", "share16",
    "atomics", "problem", "flops", "bytes", "bound", "estimate_us", "exceptions", "shortcomings",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One row to be made: the entry's place (module of this package, position in its list) and how to compile it."""

    module: str
    number: int
    config: Config
    size: str
    dtype: str
    target: str


def modules() -> list[str]:
    """Names of the modules of this package that have kernels."""
    here = Path(__file__).parent
    names = [m.name for m in pkgutil.iter_modules([str(here)])]
    return [name for name in sorted(names) if "\ndef entries()" in (here / f"{name}.py").read_text(encoding="utf-8")]


@functools.cache
def entries(module: str) -> tuple[Entry, ...]:
    """What the module of this package describes."""
    return tuple(importlib.import_module(f"{__package__}.{module}").entries())


def variants(entry: Entry, target: str) -> Iterator[tuple[str, str, Config]]:
    """(dtype, size class, config) of every launch that the table knows for this target; configs that are the same come once."""
    seen = set()
    for dtype in entry.dtypes:
        for size in entry.sizes or configs.sizes(entry.name):
            config = configs.pick(entry.name, dtype, size, target)
            key = dtype, tuple(sorted(config.options.items()))
            if key not in seen:
                seen.add(key)
                yield dtype, size, config


def rows(
    targets: Sequence[str] = tuple(CHIPS),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = ("fp32", "bf16", "fp16"),
    jobs: int = 1,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """The table: one dict with the keys of COLUMNS per kernel x config x dtype x target, for all operators or those named."""
    todo = [
        Job(module, number, config, size, dtype, target)
        for module in modules()
        for number, entry in enumerate(entries(module))
        if not ops or entry.op in ops
        for target in targets
        if target in entry.targets
        for dtype, size, config in variants(entry, target)
        if dtype in dtypes
    ]
    result = [None] * len(todo)
    for index, measured in _measure_all(todo, jobs):
        job = todo[index]
        result[index] = describe(entries(job.module)[job.number], job, measured)
        progress(result[index])
    return result + [row for row in _rows_of_cuda(targets, ops) if row["dtype"] in dtypes]


def describe(entry: Entry, job: Job, measured: dict[str, Any]) -> dict[str, Any]:
    """The row of a compiled kernel."""
    work, chip = entry.work(job.dtype), CHIPS[job.target]
    measured = {
        **dict.fromkeys(("registers", "stack_bytes", "spills", "shared_bytes"), 0),
        "mma": {},
        "share16": 1.0,
        "atomics": {},
        **measured,
    }
    seconds, bound = chip.seconds(work.flops, work.bytes, job.dtype, entry.matrix)
    row = {
        "kernel": entry.name, "op": entry.op, "variant": entry.variant, "size": job.size, "config": str(job.config), "dtype": job.dtype,
        "target": job.target, **measured, "problem": entry.problem, "flops": work.flops, "bytes": work.bytes, "bound": bound,
        "estimate_us": round(1e6 * seconds, 3),
    }  # fmt: skip
    lacks = _lacks(entry, row)
    excused = {gate: entry.excuse(gate, job.target, job.dtype) for gate in lacks}
    if "tensor cores" in lacks and job.dtype == "fp32" and any("TF32" in name for name in measured["mma"]):
        excused["tensor cores"] = _FEW_ROWS
    row["exceptions"] = "; ".join(f"{gate}: {reason}" for gate, reason in excused.items() if reason)
    row["shortcomings"] = "; ".join(f"{gate}: {what}" for gate, what in lacks.items() if not excused[gate])
    return {column: row[column] for column in COLUMNS}


_FEW_ROWS = "HMMA in TF32: three products a product leave registers for fewer rows than HGMMA takes"


def _lacks(entry: Entry, row: dict[str, Any]) -> dict[str, str]:
    """gate -> what is wrong with the row."""
    target, chip, found = row["target"], CHIPS[row["target"]], {}
    if "error" in row:
        return {"compiles": row["error"].strip().splitlines()[-1]}
    if row["stack_bytes"]:
        found["stack"] = f"{row['stack_bytes']} bytes"
    # MI300 spills into its accumulation registers first: memory takes part only where there is a stack.
    if row["spills"] and (chip.backend == "cuda" or row["stack_bytes"]):
        found["spills"] = f"{row['spills']} loads and stores"
    if row["shared_bytes"] > chip.shared:
        found["shared"] = f"{row['shared_bytes']} bytes where {chip.name} has {chip.shared}"
    if row["atomics"]:
        found["atomics"] = f"{row['atomics']}: the order of programs shows in sums"
    if entry.streaming and chip.backend == "cuda" and row["share16"] < WIDE:
        found["wide"] = f"{row['share16']:.0%} of the bytes move in 16-byte accesses"
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA"}.get(target, "")
    if (
        entry.matrix
        and (row["dtype"] != "fp32" or target == "sm_90")
        and not any(name.startswith(wanted) for name in row["mma"])
    ):
        found["tensor cores"] = f"no {wanted or 'matrix'} instruction, but {row['mma'] or 'none'}"
    return found


# ---- compiling -------------------------------------------------------------------------------------------------------


def measure(entry: Entry, config: Config, dtype: str, target: str) -> dict[str, Any]:
    """Compiles for `target` and reads the machine code: registers, stack_bytes, spills, shared_bytes, mma, share16, atomics."""
    import triton

    chip = CHIPS[target]
    with _private_cache(), _fp32_products(target), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(_source(entry, config, dtype, target), target=_gpu(target), options=_options(config))
    found = binary.of_nvidia(compiled.asm["cubin"]) if chip.backend == "cuda" else binary.of_amd(compiled.asm["amdgcn"])
    return {**found, "shared_bytes": compiled.metadata.shared}


def _source(entry: Entry, config: Config, dtype: str, target: str) -> Any:
    """The kernel with the specialisation that a launch finds: pointers divisible by 16, on AMD within 2 GB, and the entry's `aligned`."""
    from triton.compiler import ASTSource

    if not hasattr(entry.kernel, "cache_key"):
        raise RuntimeError("ov3fast.kernels.aot compiles nothing under TRITON_INTERPRET=1")
    arguments = dict(entry.arguments(dtype))
    both = sorted(set(entry.constexprs) & set(config.blocks))
    if both:
        raise ValueError(f"{entry.name}: {', '.join(both)} are set by the entry and by its config")
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
                raise ValueError(f"{entry.name}: neither the entry nor the config {config} says what {name} is")
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
    """Triton's own cache in a folder that goes at the end: what is worth keeping is the row."""
    import triton

    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


@contextmanager
def _fp32_products(target: str) -> Iterator[None]:
    """Float32 products as a PyTorch made for the target has them."""
    import triton.language as tl

    from . import common

    before, common.FP32_PRODUCTS = common.FP32_PRODUCTS, tl.constexpr("tf32x3" if CHIPS[target].backend == "cuda" else "ieee")
    try:
        yield
    finally:
        common.FP32_PRODUCTS = before


# ---- in many processes, and remembered -------------------------------------------------------------------------------


def _measure_all(todo: Sequence[Job], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, result) of all jobs, those that are remembered first."""
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
    # Fresh processes: a forked one would inherit locks of threads that it does not have.
    with ProcessPoolExecutor(min(jobs, len(missing)), multiprocessing.get_context("spawn")) as pool:
        yield from zip(missing, pool.map(run, [todo[index] for index in missing]), strict=True)


def run(job: Job) -> dict[str, Any]:
    """Measures a job and remembers the result; of a kernel that does not compile, why."""
    try:
        # Asked for before anything is compiled: Triton hashes a kernel once, with the globals of that moment, and `measure` sets one.
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
    """File of the job's result: named by the kernel's source with all that it calls, its arguments, the target and the tools."""
    import triton

    source = _source(entries(job.module)[job.number], job.config, job.dtype, job.target)
    tools = triton.__version__, inspect.getsource(binary), inspect.getsource(measure)
    what = source.hash(), list(source.signature), source.name, _options(job.config), job.target, tools
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    folder = os.environ.get("OV3FAST_AOT_CACHE") or Path(tempfile.gettempdir(), f"ov3fast-aot-{os.getuid()}")
    return Path(folder, f"{key}.json")


def _rows_of_cuda(targets: Sequence[str], ops: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the CUDA C++ kernels, where nvcc is installed."""
    if importlib.util.find_spec(f"{__package__}.cuda_aot") is None:
        return []
    cuda = importlib.import_module(f"{__package__}.cuda_aot")
    if ops and not {kernel.op for kernel in cuda.kernels()} & set(ops):
        return []
    defaults = dict.fromkeys(COLUMNS, "") | {"mma": {}, "atomics": {}, "share16": 1.0}
    found = [{**defaults, **row} for row in cuda.rows([t for t in targets if t in CHIPS and CHIPS[t].backend == "cuda"])]
    return [{column: row[column] for column in COLUMNS} for row in found if not ops or row["op"] in ops]


# ---- the table -------------------------------------------------------------------------------------------------------


def flat(row: dict[str, Any]) -> dict[str, str]:
    """A row's values as text, as the CSV and the printed table have them."""
    numbers = {"flops": "{:.4g}", "bytes": "{:.4g}", "share16": "{:.2f}", "estimate_us": "{:.2f}"}
    text = {}
    for column, value in row.items():
        if isinstance(value, dict):
            text[column] = " ".join(f"{count}x{name}" for name, count in value.items())
        else:
            text[column] = numbers[column].format(value) if column in numbers and value != "" else str(value)
    return text


def write_csv(table: Iterable[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat(row) for row in table)


def markdown(table: Sequence[dict[str, str]]) -> str:
    """Rows of the CSV as one table: a line per launch, a column per target, in bfloat16 where the kernel takes it."""
    narrow = {row["kernel"] for row in table if row["dtype"] == "bf16"}
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in table:
        if row["dtype"] == "bf16" or row["kernel"] not in narrow:
            how = " ".join(filter(None, (row["variant"], "" if row["size"] == configs.ANY else row["size"])))
            work = f"{_short(row['flops'])}FLOP, {_short(row['bytes'])}B"
            lines.setdefault((row["kernel"], how, row["problem"], work), {})[row["target"]] = _cell(row)
    head = ["kernel", "variant", "size", "work", *(f"{chip.name} ({target})" for target, chip in CHIPS.items())]
    body = [[*launch, *(cells.get(target, "") for target in CHIPS)] for launch, cells in lines.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def _cell(row: dict[str, str]) -> str:
    matrix = sorted({re.split(r"[.]|_f32_", name.split("x", 1)[1])[0] for name in row["mma"].split()})
    parts = (
        f"{row['registers']} registers",
        f"{int(row['shared_bytes']) / 1024:.3g} KB" if row["shared_bytes"] not in ("", "0") else "",
        "+".join(matrix),
        f"{float(row['estimate_us']):.3g} µs ({row['bound']})" if row["estimate_us"] else "",
        f"({row['exceptions']})" if row["exceptions"] else "",
        f"**{row['shortcomings']}**" if row["shortcomings"] else "",
    )
    return ", ".join(filter(None, parts))


def _short(number: str) -> str:
    value = float(number)
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"


@dataclass
class Options:
    target: tuple[str, ...] = tuple(CHIPS)
    """sm_80, sm_90, sm_100, gfx942."""
    op: tuple[str, ...] = ()
    """Operators; all if none is named."""
    dtype: tuple[str, ...] = ("fp32", "bf16", "fp16")
    json: Path | None = None
    csv: Path | None = None
    markdown: Path | None = None
    """A shorter table: one line per launch, a column per target."""
    jobs: int = os.cpu_count() or 1
    """Processes."""


def main(options: Options) -> int:
    """Prints the table; 1 where a row falls short of the gate."""
    from rich.console import Console
    from rich.table import Table

    unknown = sorted(set(options.target) - set(CHIPS))
    if unknown:
        raise ValueError(f"--target takes {', '.join(CHIPS)}; got {', '.join(unknown)}")
    console = Console(width=None if sys.stdout.isatty() else 220)
    with console.status("compiling") as status:
        table = rows(
            options.target,
            options.op,
            options.dtype,
            options.jobs,
            lambda row: status.update(f"{row['kernel']} {row['target']}"),
        )
    printed = Table(
        "kernel", "variant", "config", "dtype", "target", "regs", "stack", "spills", "shared", "mma", "16 B", "bound", "µs", ""
    )
    for row in table:
        text = flat(row)
        printed.add_row(
            text["kernel"], text["variant"], text["config"], text["dtype"], text["target"], text["registers"], text["stack_bytes"],
            text["spills"], text["shared_bytes"], text["mma"], text["share16"], text["bound"], text["estimate_us"],
            f"[red]{text['shortcomings']}[/red]" if text["shortcomings"] else text["exceptions"],
        )  # fmt: skip
    console.print(printed)
    if options.csv is not None:
        write_csv(table, options.csv)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(table, indent=1))
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown([flat(row) for row in table]) + "\n", encoding="utf-8")
    short = [row for row in table if row["shortcomings"]]
    console.print(f"{len(table)} rows, {len(short)} short of the gate")
    return 1 if short else 0


def command() -> int:
    """`main` with the command line's options; bad ones are named."""
    import tyro

    try:
        return main(tyro.cli(Options, description=__doc__))
    except ValueError as reason:
        print(f"aot: {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # Under the name that importers know it by, which results are remembered under.
    from ov3fast.kernels import aot

    sys.exit(aot.command())
