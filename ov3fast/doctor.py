"""What this machine can run: `ov3fast doctor` prints it, `report()` returns it.

Looks without touching: no driver is started, nothing is compiled or downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
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
    """Sections of name -> finding: "machine", "packages", "tools", "files" and "operators" (op -> backend -> status)."""
    import torch

    from ov3fast import __version__, ops
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
            "OV3FAST_CPU_ISA": os.environ.get("OV3FAST_CPU_ISA", "not set: the CPU kernels use the widest instruction set"),
            "OV3FAST_IMPL": os.environ.get("OV3FAST_IMPL", "not set: each operator picks its first backend that is ready"),
        },
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
    """Prints the report as tables."""
    from rich.markup import escape
    from rich.table import Table

    from ov3fast import ops
    from ov3fast.terminal import console as make_console

    console = make_console()
    found = report()
    for section in ("machine", "packages", "tools", "files"):
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in found[section].items():
            table.add_row(name, escape(str(value)))
        console.print(table, "")
    operators = found["operators"]
    backends = [name for name in ops.BACKENDS if any(name in status for status in operators.values())]
    table = Table(title="operators", title_justify="left", padding=(0, 0))
    table.add_column("operator", no_wrap=True)
    for heading in ("on the CPU", *backends):
        table.add_column(heading)
    reasons: list[str] = []
    for op, status in operators.items():
        table.add_row(op, on_cpu(status), *(_short(status.get(name), reasons) for name in backends))
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"  ({number}) {escape(reason)}")


def on_cpu(status: dict[str, str]) -> str:
    """The backend that runs an operator's float32 and bfloat16 calls on CPU tensors."""
    return next(name for name in ("cpu", "sdpa", "reference") if status.get(name) == "ready")


def _cpu_kernels() -> str:
    """The instruction set in use and those that were built and run here."""
    from ov3fast.ops import cpu

    if (reason := cpu.missing()) is not None:
        return reason
    return f"{cpu.isa()} in use; {', '.join(cpu.available_isas())} run here"


def _cuda_kernels() -> str:
    """What they were built for, or why they can't run."""
    from ov3fast.ops import cuda

    build = cuda.build_notes()
    if build is None:
        return "not built: pip install needs nvcc and an NVIDIA driver, or OV3FAST_CUDA=1"
    chips = ", ".join(f"sm_{number}" for number in build["architectures"])
    return f"{chips}, by CUDA {'.'.join(map(str, build['toolkit']))}" + (f"; {reason}" if (reason := cuda.missing()) else "")


def _short(status: str | None, reasons: list[str]) -> str:
    """'ready', or the number of the reason why not."""
    if status is None or status == "ready":
        return "[green]ready[/green]" if status else ""
    if status not in reasons:
        reasons.append(status)
    return f"[yellow]no ({reasons.index(status) + 1})[/yellow]"


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
