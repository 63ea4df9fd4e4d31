"""Threads for reading and decoding: both release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Threads:
    """A thread pool that starts when it is first used, and again in each process that inherits it: threads don't survive a fork."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """The results in order; in the calling thread if there is nothing to do at once."""
        if self.count == 1 or len(items) < 2:
            return list(map(function, items))
        return list(self._executor().map(function, items))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Runs the call in the background and drops its result."""
        self._executor().submit(function, *arguments)

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(self.count)
        return self._pool[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_pool": None}
