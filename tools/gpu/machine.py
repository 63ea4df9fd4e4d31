"""Checks the requirements of a run and records its machine: python -m tools.gpu.machine ROWS. Anything missing gets a row and ends the run."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from .rows import Rows

PACKAGES = ("torch", "numpy", "triton")


def main() -> None:
    rows = Rows(Path(sys.argv[1]))
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    for name in absent:
        rows.write("machine", "package", "missing", detail=name)
    if absent:
        return
    import torch

    from . import setting

    if importlib.util.find_spec("ov3fast.kernels") is None:
        rows.write(
            "machine",
            "source tree",
            "missing",
            detail="ov3fast.kernels: ov3fast/kernels is a link to ../kernels (ln -sfn ../kernels ov3fast/kernels)",
        )
        return
    from benches import timing
    from ov3fast import ops

    facts = {
        "python": platform.python_version(), "torch": torch.__version__, "commit": timing.commit(), "rehearsal": setting.REHEARSAL,
        **{name: __import__(name).__version__ for name in PACKAGES[1:]},
    }  # fmt: skip
    if not setting.REHEARSAL:
        if not torch.cuda.is_available():
            rows.write("machine", "GPU", "missing", detail="torch.cuda.is_available() is False")
            return
        from ov3fast.kernels.lib import cuda_driver

        facts |= {
            "gpu": torch.cuda.get_device_name(), "capability": str(torch.cuda.get_device_capability()), "cuda": str(torch.version.cuda),
            "driver": cuda_driver.version(), "cudnn": torch.backends.cudnn.version(), "nvidia-smi": _nvidia_smi(),
        }  # fmt: skip
    rows.write("machine", "facts", detail=", ".join(f"{name} {value}" for name, value in facts.items()), facts=facts)
    backends_that_are_not_there(rows, ops.table(), setting.BACKENDS)


def backends_that_are_not_there(rows: Rows, table: Mapping[str, Mapping[str, str]], backends: Iterable[str]) -> None:
    """Writes a row for each: tests of a missing backend are skipped, so the run would look successful without it."""
    for op, states in table.items():
        for backend in backends:
            if states.get(backend, "ready") != "ready":
                rows.write(op, "backend", "missing", backend=backend, detail=states[backend])


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "not there"


if __name__ == "__main__":
    main()
