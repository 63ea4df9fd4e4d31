"""Subprocesses with a time limit, one per operator, so that a kernel that hangs or corrupts its context affects nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .rows import Rows

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Job:
    name: str
    command: list[str]
    limit: float
    """Seconds after which the job is killed."""
    environment: dict[str, str] = field(default_factory=dict)
    finished: Callable[[int, str], None] | None = None
    """Called with the exit status and the output; without it, a nonzero status writes a row."""


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def run_all(jobs: Iterable[Job], rows: Rows, end: float, at_once: int = 1) -> None:
    """Runs the jobs, `at_once` at a time, until time.monotonic() reaches `end`; writes a row for each that fails, is killed or is not reached."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once and time.monotonic() < end:
            running.append(_Running(waiting.pop(0)))
        if not running:
            break
        time.sleep(0.05)
        running = [one for one in running if not one.over(rows, end)]
    for job in waiting:
        rows.write(job.name, "run", "not reached", detail="the time was up")


class _Running:
    def __init__(self, job: Job):
        self.job = job
        self.output = tempfile.TemporaryFile()
        self.began = time.monotonic()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *_paths()]),
            "PYTHONUNBUFFERED": "1",
            **job.environment,
        }
        # In its own process group, so that a compiler that it started is killed with it.
        self.process = subprocess.Popen(
            job.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def over(self, rows: Rows, end: float) -> bool:
        status, now = self.process.poll(), time.monotonic()
        killed = status is None and (now >= self.began + self.job.limit or now >= end)
        if status is None and not killed:
            return False
        if killed:
            os.killpg(self.process.pid, signal.SIGKILL)
            status = self.process.wait()
        self.output.seek(0)
        words = self.output.read().decode(errors="replace")
        if killed:
            rows.write(self.job.name, "run", "killed", detail=f"after {now - self.began:.0f} s\n{_last_lines(words)}")
        elif self.job.finished is not None:
            self.job.finished(status, words)
        elif status:
            rows.write(self.job.name, "run", "failed", detail=f"exit status {status}\n{words}")
        return True


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]


def _last_lines(words: str) -> str:
    return "\n".join(words.strip().splitlines()[-5:])
