"""The processes of a run: `torchrun` starts them, each gets its share of every global batch.

Gradients go through DistributedDataParallel (NCCL on GPUs, gloo on CPUs). Small decisions that all ranks must take alike
(stop now, a loss is not finite, how much time has passed) go through a gloo group of CPU tensors, so that they never
wait for the GPU's queue.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ov3fast.models.pretrained import check_device

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

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """Elementwise maximum over the ranks."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks of a CPU tensor, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.control)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            dist.barrier(group=self.control)


def start(device: str | torch.device | None = None) -> Ranks:
    """Joins the processes that torchrun's environment names; one process where there is none.

    device: None takes this rank's GPU where there is one, else the CPU.
    """
    missing = [name for name in TORCHRUN if name not in os.environ]
    if "WORLD_SIZE" in os.environ and missing:
        raise ValueError(
            f"WORLD_SIZE is set to {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not; torchrun sets {', '.join(TORCHRUN)}: "
            "start the run with it, or unset WORLD_SIZE for one process"
        )
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(device)
    if device.type != "cuda":
        check_device(device, "train")
    else:
        if device.index is None:
            device = torch.device("cuda", local)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: {device} is not there; this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        # Once for the life of the process: torchrun's store still has a group's addresses after it was destroyed.
        dist.init_process_group(backend)
        atexit.register(dist.destroy_process_group)
    control = dist.new_group(backend="gloo") if backend == "nccl" else dist.group.WORLD
    return Ranks(rank, world, device, dist.group.WORLD, control)
