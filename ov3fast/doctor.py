"""What this machine can run: `ov3fast doctor` prints it, `report()` returns it.

Looks without touching: no driver is started, nothing is compiled or downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

OPTIONAL = {
    "triton": "Triton kernels",
    "flash_attn": "a peer of flash_attention",
    "xformers": "a peer of flash_attention",
}
CLIENTS = {"pip": "demo data", "npm": "demo data (Fluent 3D, Twemoji)", "apt-get": "demo data (Noto, photos, Fashion-MNIST)"}


def report() -> dict[str, dict[str, Any]]:
    """Sections of name -> finding: "machine", "packages", "tools", "files" and "operators" (op -> backend -> status)."""
    import torch

    from ov3fast import __version__, ops
    from ov3fast.data.assets import default_cache_dir

    assets = Path(__file__).parent / "assets"
    return {
        "machine": {
            "python": platform.python_version(),
            "ov3fast": __version__,
            "torch": torch.__version__,
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
            "cuda": torch.version.cuda or "torch was built without it",
            "OV3FAST_IMPL": os.environ.get("OV3FAST_IMPL", "not set: each operator picks its first backend that is ready"),
        },
        "packages": {name: _version(name) or f"not installed ({use})" for name, use in OPTIONAL.items()},
        "tools": {
            "C++ compiler": _first_of("c++", "g++", "clang++") or "none found: torch.compile can't be used on the CPU",
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


def show() -> None:
    """Prints the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    found = report()
    for section in ("machine", "packages", "tools", "files"):
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in found[section].items():
            table.add_row(name, str(value))
        console.print(table, "")
    operators = found["operators"]
    backends = list(dict.fromkeys(name for status in operators.values() for name in status))
    table = Table("operator", *backends, title="operators", title_justify="left")
    for op, status in operators.items():
        table.add_row(op, *(_short(status.get(name)) for name in backends))
    console.print(table)


def _short(status: str | None) -> str:
    if status is None:
        return ""
    return "[green]ready[/green]" if status == "ready" else f"[yellow]{status}[/yellow]"


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
