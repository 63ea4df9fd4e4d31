"""How well a run uses its machine: columns of the log."""

from __future__ import annotations

import resource
import time

import torch

from ov3fast.training.cluster import CHIPS
from ov3fast.training.distributed import Ranks
from ov3fast.training.timing import Timer


class Usage:
    """row() gives what has passed since the last call."""

    def __init__(self, timer: Timer, ranks: Ranks) -> None:
        self.timer, self.ranks = timer, ranks
        self._waited, self._at = 0.0, time.monotonic()
        name = torch.cuda.get_device_name(ranks.device).lower() if ranks.device.type == "cuda" else ""
        self.peak = next((1e12 * chip.tflops for key, chip in CHIPS.items() if key in name), None)
        """FLOP/s of one GPU in dense bfloat16, None where it is not known."""

    def row(self, images_per_s: float, flops_per_image: float) -> dict[str, float]:
        """data_wait: this process's share of the time in which it waited for batches. memory_gib: its peak, on a GPU the GPU's. tflops: of
        all processes, by the model's FLOPs, 1e12 FLOP/s. mfu: those over the peak of the GPUs, where it is known."""
        waited, now = self.timer.seconds.get("data", 0.0), time.monotonic()
        # A comparison rewinds the timer.
        share = max(waited - self._waited, 0.0) / max(now - self._at, 1e-9)
        self._waited, self._at = waited, now
        rate = images_per_s * flops_per_image
        row = {"data_wait": round(min(share, 1.0), 4), "memory_gib": round(self._memory(), 3), "tflops": rate / 1e12}
        return row if self.peak is None else {**row, "mfu": rate / (self.peak * self.ranks.world)}

    def _memory(self) -> float:
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
