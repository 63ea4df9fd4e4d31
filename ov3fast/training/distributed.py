"""The processes of a run: `torchrun` starts them, each gets its share of every global batch.

Gradients go through DistributedDataParallel (NCCL on GPUs, gloo on CPUs; sizes of ranks' shares go by gloo in both). Small decisions that all ranks must take alike
(stop now, a loss is not finite, how much time has passed) go through a gloo group of CPU tensors, so that they never
wait for the GPU's queue.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ov3fast.models.pretrained import check_device

TIME_LIMIT = timedelta(minutes=30)
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets in each process's environment."""


@dataclass(frozen=True)
class Ranks:
    """This process among the run's processes. group is None in a run of one process."""

    rank: int
    world: int
    device: torch.device
    group: Any = None
    """For gradients and losses."""
    control: Any = None
    """gloo, for CPU tensors."""
    limit: timedelta = TIME_LIMIT
    """How long a process waits for the others before it ends with an error."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """Elementwise maximum over the ranks."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self._in_time():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def agree(self, **facts: int) -> None:
        """ValueError on every rank, naming the first fact that is not the same on all of them."""
        if self.group is None:
            return
        own = torch.tensor(list(facts.values()), dtype=torch.int64)
        told = [torch.empty_like(own) for _ in range(self.world)]
        with self._in_time():
            dist.all_gather(told, own, group=self.control)
        for name, values in zip(facts, torch.stack(told, 1).tolist(), strict=True):
            if len(set(values)) > 1:
                raise ValueError(f"the processes disagree: {name.replace('_', ' ')} is {values} in rank order")

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks of a CPU tensor, in place."""
        if self.group is not None:
            with self._in_time():
                dist.all_reduce(tensor, group=self.control)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        with self._in_time():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Barrier over the ranks."""
        if self.group is not None:
            with self._in_time():
                dist.barrier(group=self.control)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "imed out" not in str(error):
                raise RuntimeError(f"another process of the run has gone: {str(error).splitlines()[0]}") from error
            minutes = self.limit.total_seconds() / 60
            raise RuntimeError(
                f"another process of the run did not answer within {minutes:g} minutes (rank_timeout_minutes): it hangs, or waits elsewhere"
            ) from error


ALONE = Ranks(0, 1, torch.device("cpu"))
"""A process by itself."""


def start(device: str | torch.device | None = None, limit: timedelta = TIME_LIMIT) -> Ranks:
    """Joins the process group described by torchrun's environment; a single process where there is none. `limit` is that of every wait
    for the others.

    device: None takes this rank's GPU where there is one, else the CPU.
    """
    several = _check_environment()
    world, rank, local = (int(os.environ[name]) if several else alone for name, alone in zip(TORCHRUN, (1, 0, 0), strict=False))
    if device is None:
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if not str(device).startswith("cuda"):
        device = check_device(device, "train")
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: {device} is not there; this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if not several:
        return Ranks(0, 1, device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        # Once for the life of the process: torchrun's store still has a group's addresses after it was destroyed.
        dist.init_process_group(backend, timeout=limit)
        atexit.register(dist.destroy_process_group)
    control = dist.new_group(backend="gloo", timeout=limit) if backend != "gloo" else dist.group.WORLD
    return Ranks(rank, world, device, dist.group.WORLD, control, limit)


def _check_environment() -> bool:
    """Whether torchrun started this process. ValueError for half of its environment, and for numbers that can't be."""
    given = next((name for name in ("WORLD_SIZE", "RANK") if name in os.environ), None)
    if given is None:
        return False
    if missing := [name for name in TORCHRUN if not os.environ.get(name)]:
        raise ValueError(
            f"{given} is set to {os.environ[given]!r} but {', '.join(missing)} is not; torchrun sets {', '.join(TORCHRUN)}: "
            f"start the run with it, or unset {given} for one process"
        )
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise ValueError(f"{name} must be a number, got {os.environ[name]!r}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise ValueError(f"RANK must be below WORLD_SIZE = {os.environ['WORLD_SIZE']}, got {os.environ['RANK']}")
    return True
