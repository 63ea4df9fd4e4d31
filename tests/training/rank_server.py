"""Starts the processes of a run many times over: it imports everything once and forks them for each line that it reads.

{"world": 2, "data": ..., "out": ..., "jobs": [...], "limit": 120} -> {"pids": [...]} at once, {"codes": [...]} when all have ended

They meet as torchrun's would. Rank r writes to out/rank-r.txt. After `limit` seconds a SIGALRM ends it: none is left behind. jobs: many_ranks.main's.
"""

import importlib.util
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fork(order: dict, rank: int, port: int, work) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(order["limit"])
    file = os.open(Path(order["out"]) / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    world = str(order["world"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )  # fmt: skip
    code = 1
    try:
        work(Path(order["data"]), Path(order["out"]), order["jobs"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    work = load("many_ranks").main

    def say(**words) -> None:
        print(json.dumps(words), flush=True)

    say(ready=True)
    for line in sys.stdin:
        order, port = json.loads(line), free_port()
        pids = [fork(order, rank, port, work) for rank in range(order["world"])]
        say(pids=pids)
        ended = dict(os.waitpid(pid, 0) for pid in pids)
        say(codes=[os.waitstatus_to_exitcode(ended[pid]) for pid in pids])


if __name__ == "__main__":
    main()
