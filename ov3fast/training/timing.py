"""Where a step's time goes: named parts, summed over the run.

    timer = Timer(device)
    with timer("vae"):
        ...
    timer.watch(encoder=model.encoder)      # the module's forward counts as part "encoder"
    timer.table()                           # part -> seconds

Parts inside other parts count once, for the innermost. On a GPU a part's time is that of the launches unless `synchronize` is on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Timer:
    """Seconds per named part."""

    def __init__(self, device: torch.device, synchronize: bool = False) -> None:
        self._wait = (lambda: torch.cuda.synchronize(device)) if synchronize and device.type == "cuda" else (lambda: None)
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._enter(part)
        try:
            yield
        finally:
            self._leave()

    def watch(self, **modules: nn.Module) -> None:
        """Charges each module's forward to the part that its keyword names."""
        for part, module in modules.items():
            module.register_forward_pre_hook(lambda *_, part=part: self._enter(part))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def table(self) -> dict[str, float]:
        """Part -> seconds so far, the largest first."""
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))

    def reset(self) -> None:
        self.seconds.clear()

    def _enter(self, part: str) -> None:
        self._count()
        self._open.append(part)

    def _leave(self) -> None:
        self._count()
        self._open.pop()

    def _count(self) -> None:
        """Adds the time since the last change to the part that is running."""
        self._wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now
