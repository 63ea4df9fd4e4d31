"""Ending a run from outside: SIGTERM, SIGUSR1 and the first Ctrl-C ask it to save and stop after the current step.

The data workers ignore SIGTERM and SIGINT (data.loader), so that a signal to the process group leaves them to the run.
The handler only sets a flag; saving inside a handler could run in the middle of an update. A second Ctrl-C stops at once.
A job whose wall time is known (recipe.wall_minutes) stops the same way before it is over.
"""

from __future__ import annotations

import signal
import threading
import time
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


class Deadline:
    """The end of the job's wall time, `seconds` after this object is made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()
        self._longest_step = 0.0

    def note_step(self, seconds: float | None) -> None:
        """How long a step took; None at the first of a stage, whose time isn't known."""
        self._longest_step = 0.0 if seconds is None else max(self._longest_step, seconds)

    def is_near(self, longest_save: float) -> bool:
        """Whether what is left is for ending two steps and for a save like the longest so far (0: none yet)."""
        save = longest_save or min(60.0, self.seconds / 10)
        return time.monotonic() - self._began + 2 * self._longest_step + 2 * save > self.seconds
