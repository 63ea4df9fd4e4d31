"""One of two processes is killed at 20 random moments, every other one while a checkpoint is being written; the other ends by itself, and the run
ends with the bits of one that never was killed.

OV3FAST_KILLS sets another number of times and OV3FAST_KILL_SEED other moments.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ov3fast.training import checkpoint
from ov3fast.training.logs import read_rows

KILLS = int(os.environ.get("OV3FAST_KILLS", "20"))
SEED = int(os.environ.get("OV3FAST_KILL_SEED", "0"))
LIMIT = 300
"""Seconds that a start of the run may take: neither process hangs."""
CLOCK = ("seconds", "images_per_s", "data_wait", "memory_gib", "tflops")
pytestmark = pytest.mark.full


def jobs(parallel: str, kills: int) -> list[dict]:
    fields = {
        "parallel": parallel,
        "stages": [[3 * kills // 2, 32], [kills, 48]],
        "checkpoint_steps": 1,
        "keep": 2,
        "resume": True,
    }
    return [{"name": "run", "do": "train", "fields": {**fields, "gradient_norms_every": None}}]


def rows(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_rows(run / "log.jsonl")]


def wait_until(condition, pids: list[int]) -> None:
    began = time.monotonic()
    while not condition() and time.monotonic() - began < LIMIT and all(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.002)


@pytest.mark.parametrize(("parallel", "kills"), [("fsdp", KILLS), ("ddp", KILLS // 4)])
def test_killed_at_random_moments(data, tmp_path, server, parallel, kills):
    server.run(2, data, tmp_path / "whole", jobs(parallel, kills), 4 * LIMIT)
    run, chance, while_saving = tmp_path / "killed" / "run", random.Random(SEED), 0
    saves = run / "checkpoints"
    for kill in range(kills):
        before = checkpoint.steps(saves)
        pids = server.start(2, data, tmp_path / "killed", jobs(parallel, kills), LIMIT)
        # Each start gets a step on, so that the moments are spread over the run.
        wait_until(lambda: checkpoint.steps(saves) != before, pids)  # noqa: B023
        if kill % 2:
            time.sleep(chance.uniform(0.0, 0.3))
        else:
            wait_until(lambda: any(saves.glob(".step-*")), pids)
            time.sleep(chance.uniform(0.0, 0.01))
        chosen = chance.randrange(2)
        os.kill(pids[chosen], signal.SIGKILL)
        while_saving += any(saves.glob(".step-*"))
        codes = server.wait()
        assert codes[chosen] == -signal.SIGKILL and codes[1 - chosen] == 1, (codes, server.output())
    assert while_saving >= kills // 4 and not (run / "summary.json").exists()
    server.run(2, data, tmp_path / "killed", jobs(parallel, kills), 4 * LIMIT)
    a, b = (checkpoint.latest(tmp_path / name / "run" / "checkpoints") for name in ("whole", "killed"))
    for group, tensors in a.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, b.tensors[group][name]), (group, name)
    assert rows(tmp_path / "whole" / "run") == rows(run)
