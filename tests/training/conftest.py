import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import data, tiny


@pytest.fixture(scope="session")
def many_ranks() -> ModuleType:
    """many_ranks.py, which rank_server.py loads by its file too."""
    spec = importlib.util.spec_from_file_location("ov3fast_tests_many_ranks", Path(__file__).with_name("many_ranks.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RankServer:
    """rank_server.py as tests use it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("rank_server.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._told("ready")

    def start(self, world: int, data: Path, out: Path, jobs: list[dict], limit: int = 120) -> list[int]:
        """Starts a run's processes; their pids."""
        out.mkdir(exist_ok=True)
        order = {"world": world, "data": str(data), "out": str(out), "jobs": jobs, "limit": limit}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        self.out, self.world = out, world
        return self._told("pids")

    def wait(self) -> list[int]:
        """The exit codes, in rank order, negative for a signal, when all processes of the last start have ended."""
        return self._told("codes")

    def output(self) -> list[str]:
        """What each process of the last start has printed."""
        return [(self.out / f"rank-{rank}.txt").read_text() for rank in range(self.world)]

    def run(self, world: int, data: Path, out: Path, jobs: list[dict], limit: int = 120) -> None:
        """Starts processes that have to end well."""
        self.start(world, data, out, jobs, limit)
        codes = self.wait()
        assert codes == [0] * world, (codes, [text[-4000:] for text in self.output()])

    def _told(self, name: str):
        line = self.process.stdout.readline()
        assert line, "rank_server.py has ended"
        return json.loads(line)[name]


@pytest.fixture(scope="session")
def server() -> Iterator[RankServer]:
    """Starts runs of several processes within a moment."""
    server = RankServer()
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(autouse=True)
def one_thread():
    """Runs compared bit for bit must sum in the same order, in this process and in subprocesses."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
