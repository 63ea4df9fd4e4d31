"""What the terminal takes: characters that its encoding lacks, pipes that close early, progress bars where there is a screen."""

from __future__ import annotations

import codecs
import os
import select
import sys
from typing import Any

ASCII = {"…": "...", "→": "->", "≥": ">=", "×": "x", "–": "-", "—": "-", "“": '"', "”": '"', "’": "'"}
BROKEN_PIPE = 128 + 13
"""Exit code of a program that SIGPIPE ends, as `cat big | head -1` would show it."""


def tolerate_encoding() -> None:
    """Lets standard output and error print any text: what their encoding lacks becomes ASCII or a backslash escape."""
    codecs.register_error("ov3fast", _to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="ov3fast")


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


def console(**options: Any) -> Any:
    """A rich Console on standard output that passes a closed pipe on as BrokenPipeError. options: rich's own."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Screen(**options)


def is_terminal() -> bool:
    """Whether progress bars have a place: where output goes to a file, rich would leave blank lines for them."""
    return sys.stdout.isatty()


def output_is_closed() -> bool:
    """Whether the reader of standard output has gone (`| head -1`)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or no file behind the stream
        return False


def silence_output() -> None:
    """Standard output to nowhere, so that the interpreter's last flush does not complain about the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
