"""One of two processes is killed repeatedly at random moments; the run ends bitwise equal to one that was never killed.

OV3FAST_KILLS sets the number of kills (default 3; 20 for a thorough test), OV3FAST_KILL_SEED their timing.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ov3fast.training import checkpoint
from ov3fast.training.logs import read_rows

KILLS = int(os.environ.get("OV3FAST_KILLS", "3"))
SEED = int(os.environ.get("OV3FAST_KILL_SEED", "0"))
LIMIT = 300
"""Time limit in seconds for each start of the run; none may hang."""
CLOCK = ("seconds", "images_per_s", "data_wait", "memory_gib", "tflops")
pytestmark = pytest.mark.full


def start(data: Path, out: Path, parallel: str) -> subprocess.Popen:
    fields = {"parallel": parallel, "stages": [[10, 32], [4, 48]], "checkpoint_steps": 1, "keep": 2, "resume": True}
    file = out / "jobs.json"
    file.write_text(json.dumps([{"name": "run", "do": "train", "fields": fields}]))
    script = Path(__file__).with_name("many_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, data, out, file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def workers(parent: int) -> list[int]:
    """Pids of its child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)


def finish(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=LIMIT)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def rows(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_rows(run / "log.jsonl")]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_at_random_moments(data, tmp_path, parallel):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    process = start(data, tmp_path / "whole", parallel)
    output = finish(process)
    assert process.returncode == 0, output
    run, chance, killed = tmp_path / "killed" / "run", random.Random(SEED), []
    for _ in range(KILLS):
        process, began, before = start(data, tmp_path / "killed", parallel), time.monotonic(), len(read_rows(run / "log.jsonl"))
        while process.poll() is None and len(read_rows(run / "log.jsonl")) <= before and time.monotonic() - began < LIMIT:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 1.0))
        pids = workers(process.pid)
        if process.poll() is None and pids:
            os.kill(chance.choice(pids), signal.SIGKILL)
        saving = bool(list((run / "checkpoints").glob(".step-*")))
        output = finish(process)
        assert process.returncode != 0 or (run / "summary.json").is_file(), output
        killed.append((checkpoint.steps(run / "checkpoints"), saving))
        if (run / "summary.json").is_file():
            break
    process = start(data, tmp_path / "killed", parallel)
    output = finish(process)
    assert process.returncode == 0, output
    a, b = (checkpoint.latest(tmp_path / name / "run" / "checkpoints") for name in ("whole", "killed"))
    for group, tensors in a.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, b.tensors[group][name]), (group, name, killed)
    assert rows(tmp_path / "whole" / "run") == rows(run), killed
