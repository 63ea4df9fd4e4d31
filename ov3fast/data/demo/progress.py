"""Progress of a build on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ov3fast import terminal

T = TypeVar("T")


class Bars:
    """rich progress bars, or silence (None)."""

    def __init__(self, bars: Any = None) -> None:
        self.bars = bars

    def track(self, items: Iterable[T], label: str) -> Iterator[T]:
        if self.bars is None:
            yield from items
            return
        total = len(items) if hasattr(items, "__len__") else None
        task = self.bars.add_task(label, total=total)
        for item in items:
            yield item
            self.bars.advance(task)
        self.bars.update(task, total=self.bars.tasks[task].completed)

    def say(self, text: str) -> None:
        if self.bars is not None:
            self.bars.console.print(text)


@contextmanager
def progress_bars(show: bool) -> Iterator[Bars]:
    if not show:
        yield Bars()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=terminal.console()) as bars:
        yield Bars(bars)
