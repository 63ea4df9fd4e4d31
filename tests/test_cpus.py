"""The number of threads respects the affinity mask, OMP_NUM_THREADS and the cgroup's CPU quota."""

import os
import subprocess
import sys

import pytest

from ov3fast import cpus

COUNT = """
import os, sys
{first}
import torch
from ov3fast import ops
before = len(os.listdir("/proc/self/task"))  # NumPy's BLAS may have some of its own, which sleep
x, w = torch.randn(256, 64), torch.randn(64, 64)
ops.linear(x, w, impl="cpu" if ops.cpu.available_isas() else None), x @ w
print(torch.get_num_threads(), 1 + len(os.listdir("/proc/self/task")) - before)
"""


def threads(first="", before=None, **environment):
    """(PyTorch's number of threads, threads used by products), in a separate process that runs our kernels first."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-c", COUNT.format(first=first)]
    done = subprocess.run(command, env={**kept, **environment}, preexec_fn=before, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_the_affinity_mask_holds():
    one = min(os.sched_getaffinity(0))
    assert threads(before=lambda: os.sched_setaffinity(0, {one})) == (1, 1)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_omp_num_threads_holds_for_the_one_pool():
    """Our kernels add no threads to PyTorch's."""
    assert threads(OMP_NUM_THREADS="1") == (1, 1)
    assert threads(OMP_NUM_THREADS="2") == (2, 2)


def test_a_share_of_cpu_time_limits_the_threads_of_commands():
    first = "from ov3fast import cpus; cpus.quota = lambda: 1.0; cpus._affinity = lambda: set(range(8)); cpus.limit_threads()"
    assert threads(first) == (1, 1)


def hierarchy(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/docker/of/the/host\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("4:memory:/\n1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("1:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("", {}, None),
    ],
)
def test_quotas_are_read(tmp_path, cgroup, files, expected):
    told = tmp_path / "cgroup"
    told.write_text(cgroup)
    assert cpus.quota(told, hierarchy(tmp_path / "fs", files)) == expected


def test_no_cgroups_at_all(tmp_path):
    assert cpus.quota(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("share", "processors", "given", "expected"),
    [(1.5, 8, None, "2"), (8.0, 8, None, None), (None, 8, None, None), (1.5, 8, "6", "6"), (0.2, 1, None, None)],
)
def test_what_commands_set(monkeypatch, share, processors, given, expected):
    monkeypatch.setattr(cpus, "quota", lambda: share)
    monkeypatch.setattr(cpus, "_affinity", lambda: set(range(processors)))
    monkeypatch.setattr(sys, "modules", {name: m for name, m in sys.modules.items() if name != "torch"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    cpus.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected
