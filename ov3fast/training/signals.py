"""Ending a run from outside: SIGTERM, SIGUSR1 and the first Ctrl-C ask it to save and stop after the current step.

The data workers ignore SIGTERM and SIGINT (data.loader), so that a signal to the process group leaves them to the run.
The handler only sets a flag; saving inside a handler could run in the middle of an update. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A context manager that listens; `.name` is the signal that came, or None. Handlers are restored on leaving."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere the run goes on without them.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
