"""How many processors this process may use.

PyTorch's pool, which our kernels share, has a thread for each processor that the affinity mask allows, or OMP_NUM_THREADS. A container's share
of CPU time (`docker run --cpus 2`) is no mask: on a machine of 64 processors 64 threads would then take turns on two, and wait for each
other at every barrier. The command line therefore starts no more threads than that share.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

THREADS = "OMP_NUM_THREADS"


def quota(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors' worth of time that the cgroups of this process allow it, the least of all levels; None where they set no limit."""
    try:
        lines = cgroup.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: list[float] = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        # Within a container the path may be the host's, of which only the end is mounted: then the root is ours.
        for folder in [top, *(top.joinpath(*Path(path).parts[1:end]) for end in range(2, len(Path(path).parts) + 1))]:
            found += filter(None, [_version_2(folder) if not controllers else _version_1(folder)])
    return min(found, default=None)


def _version_2(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _version_1(folder: Path) -> float | None:
    try:
        limit, period = (int((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period"))
        return limit / period if limit > 0 else None
    except (OSError, ValueError):
        return None


def limit_threads() -> None:
    """Sets OMP_NUM_THREADS for this process and its children where a cgroup allows less than the affinity mask does.

    Before torch is imported, which reads it once; later, and where the user has set it, nothing happens.
    """
    share = None if THREADS in os.environ or "torch" in sys.modules else quota()
    if share is not None and math.ceil(share) < len(_affinity()):
        os.environ[THREADS] = str(math.ceil(share))


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
