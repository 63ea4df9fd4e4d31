"""What this machine can run: `ov3fast doctor` prints it, `report()` returns it.

Looks without touching: no driver is started, nothing is compiled or downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import platform
import shutil
from pathlib import Path
from typing import Any

OPTIONAL = {
    "triton": "Triton kernels",
    "flash_attn": "FlashAttention-2 on A100",
    "flash_attn_interface": "FlashAttention-3 on H100",
    "xformers": "a peer of flash_attention",
}
CLIENTS = {"pip": "demo data", "npm": "demo data (Fluent 3D, Twemoji)", "apt-get": "demo data (Noto, photos, Fashion-MNIST)"}


def report() -> dict[str, dict[str, Any]]:
    """Sections of name -> finding: "machine", "environment", "choice" (of backends on the CPU: the chip, the rule and its rows), "packages",
    "tools", "files" and "operators" (op -> backend -> status)."""
    import torch

    from ov3fast import __version__, environment, ops
    from ov3fast.data.assets import default_cache_dir
    from ov3fast.ops._attention_peers import rule as attention_rule

    assets = Path(__file__).parent / "assets"
    return {
        "machine": {
            "python": platform.python_version(),
            "ov3fast": __version__,
            "torch": torch.__version__,
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
            "CPU kernels": _cpu_kernels(),
            "CUDA kernels": _cuda_kernels(),
            "cuda": torch.version.cuda or "torch was built without it",
            "attention on CUDA": attention_rule(),
        },
        "environment": environment.report(),
        "choice": choice_report(),
        "packages": {name: _version(name) or f"not installed ({use})" for name, use in OPTIONAL.items()},
        "tools": {
            "C++ compiler": _first_of("c++", "g++", "clang++")
            or "none found: CPU kernels can't be built, nor torch.compile used on the CPU",
            "nvcc": _first_of("nvcc") or "none found: CUDA C++ operators are left out",
            **{name: shutil.which(name) or f"none found: {use} is left out" for name, use in CLIENTS.items()},
        },
        "files": {
            "small VAE": _present(assets / "small_vae" / "config.json"),
            "vocabulary": _present(assets / "bert_uncased_vocab.txt"),
            "cache": str(default_cache_dir()),
        },
        "operators": ops.table(),
    }


def print_json() -> None:
    """Prints the report as one JSON object."""
    print(json.dumps(report(), indent=1, default=str))


def show() -> None:
    """Prints the report as tables that fit 80 columns."""
    from rich.markup import escape
    from rich.table import Table

    from ov3fast import ops, terminal

    console = terminal.console()
    found = report()
    layout = {"title_justify": "left", "box": None, "padding": (0, 2, 0, 0)}
    for section in ("machine", "environment", "packages", "tools", "files"):
        table = Table(title=section, show_header=False, **layout)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in found[section].items():
            table.add_row(f"  {name}", escape(str(value)))
        console.print(table, "")
    show_choice(console, found["choice"], layout)
    table = Table(title="operators, their backends in order of preference", **layout)
    for heading in ("  operator", "on the CPU", "ready", "not here, why"):
        table.add_column(heading, no_wrap=heading == "  operator")
    reasons: list[str] = []
    for op, status in found["operators"].items():
        names = [name for name in ops.BACKENDS if name in status]
        ready = ", ".join(name for name in names if status[name] == "ready")
        rest = ", ".join(f"{name} ({_number(status[name], reasons)})" for name in names if status[name] != "ready")
        table.add_row(f"  {op}", on_cpu(op, status, found["choice"]), f"[green]{ready}[/green]", f"[yellow]{rest}[/yellow]")
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"  ({number}) {escape(reason)}")


def choice_report() -> dict[str, Any]:
    """The chip, the instruction set and threads in use, where the rule is from, and its rows."""
    import torch

    from ov3fast.ops import _chip, _choice, cpu

    chip = _chip.current()
    facts = {"chip": f"{chip.name} ({chip.model})", "threads": torch.get_num_threads()}
    if cpu.unavailable_reason() is not None:
        return {**facts, "rule": "PyTorch runs everything: there are no CPU kernels", "rows": []}
    try:
        table, source = _choice.rule()
    except ValueError as error:  # OV3FAST_CPU_ISA names none
        return {**facts, "rule": str(error), "rows": []}
    rows = [
        {
            "operator": c.operator,
            "direction": c.direction,
            "dtype": c.dtype,
            "size": dict(zip(_choice.DIMENSIONS[c.operator].split(", "), c.size, strict=True)),
            "backend": c.backend,
            "ratio": None if math.isnan(c.ratio) else round(c.ratio, 2),
            "over": c.over,
        }
        for choices in table.values()
        for c in choices
    ]
    return {**facts, "instruction set": cpu.isa(), "rule": source, "rows": rows}


def show_choice(console: Any, found: dict[str, Any], layout: dict[str, Any]) -> None:
    """The choice of backends: a line for each operator, direction and backend."""
    from rich.markup import escape
    from rich.table import Table

    from ov3fast.ops import _choice

    table = Table(title="choice of backends on the CPU", show_header=False, **layout)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.items():
        if name != "rows":
            table.add_row(f"  {name}", escape(str(value)))
    console.print(table, "")
    by_call: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        by_call.setdefault((row["operator"], row["direction"], row["backend"]), []).append(row)
    table = Table(**layout)
    for heading in ("  operator", "call", "takes", "which was faster by"):
        table.add_column(heading, no_wrap=heading == "  operator")
    for (op, direction, backend), rows in sorted(by_call.items()):
        others = {key[2] for key in by_call if key[:2] == (op, direction)} - {backend}
        ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
        over = ", ".join(dict.fromkeys(row["over"] for row in rows if row["over"]))
        ends = " to ".join(dict.fromkeys(f"{end:.2f}" for end in (min(ratios), max(ratios)))) if ratios else ""
        why = f"{ends}x {over}" if ratios else "not timed against each other"
        if others and backend != _choice.OURS:
            why += ": " + "; ".join(f"{row['dtype']} " + "x".join(map(str, row["size"].values())) for row in rows)
        table.add_row(f"  {op}", direction, backend, why)
    if not found["rows"]:
        for op, backend in _choice.PRODUCTS.items():
            table.add_row(f"  {op}", "both", backend, "")
        table.add_row("  all others", "both", _choice.OURS, "")
    console.print(table, "")


def on_cpu(op: str, status: dict[str, str], found: dict[str, Any]) -> str:
    """The backends that run an operator's float32 and bfloat16 calls on CPU tensors."""
    from ov3fast.ops import _choice

    first = next(name for name in ("cpu", "sdpa", "eager") if status.get(name) == "ready")
    if first != _choice.OURS or op not in _choice.SIZES:
        return first
    op = _choice.SHARED.get(op, op)
    chosen = [row["backend"] for row in found["rows"] if row["operator"] == op]
    return ", ".join(dict.fromkeys(chosen)) or _choice.PRODUCTS.get(op, first)


def _cpu_kernels() -> str:
    """The instruction set in use and those that were built and run here."""
    from ov3fast.ops import cpu

    if (reason := cpu.unavailable_reason()) is not None:
        return reason
    try:
        return f"{cpu.isa()} in use; {', '.join(cpu.available_isas())} run here"
    except ValueError as error:  # OV3FAST_CPU_ISA names none: say so, and go on
        return str(error)


def _cuda_kernels() -> str:
    """What they were built for, or why they can't run."""
    from ov3fast.ops import cuda

    build = cuda.build_notes()
    if build is None:
        return "not built: pip install needs nvcc and an NVIDIA driver, or OV3FAST_CUDA=1"
    chips = ", ".join(f"sm_{number}" for number in build["architectures"])
    return f"{chips}, by CUDA {'.'.join(map(str, build['toolkit']))}" + (
        f"; {reason}" if (reason := cuda.unavailable_reason()) else ""
    )


def _number(reason: str, reasons: list[str]) -> int:
    """The reason's place, from 1, in the list of those met so far."""
    if reason not in reasons:
        reasons.append(reason)
    return reasons.index(reason) + 1


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _first_of(*names: str) -> str | None:
    return next((path for path in map(shutil.which, names) if path), None)


def _present(path: Path) -> str:
    return "shipped" if path.is_file() else f"missing: {path}"
