"""The rows of a run: JSON lines, each written before the next check starts, by several processes concurrently."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""operator, direction, dtype, size, check, status, and the check's results: ratio, ms, host_us, detail ..."""

GOOD = ("ok", "left out")
"""Statuses that count as success. The others: "over" (the budget), "failed", "killed", "missing", "not reached"."""

LARGEST_FILE = 16 * 2**20
DETAIL = 2000
"""A detail is cut to its last so many characters."""


class Rows:
    """Appends to one file."""

    def __init__(self, path: Path):
        self.path = path

    def write(
        self,
        operator: str,
        check: str,
        status: str = "ok",
        *,
        direction: str = "",
        dtype: str = "",
        size: str = "",
        **more: Any,
    ) -> Row:
        """Returns the row. Does nothing once the file is full."""
        row = {"operator": operator, "direction": direction, "dtype": dtype, "size": size, "check": check, "status": status}
        row |= {name: value[-DETAIL:] if isinstance(value, str) else value for name, value in more.items()}
        line = (json.dumps(row) + "\n").encode()
        # A single write per line with O_APPEND, which is atomic across processes.
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if os.fstat(handle).st_size + len(line) <= LARGEST_FILE:
                os.write(handle, line)
        finally:
            os.close(handle)
        return row

    def read(self) -> list[Row]:
        """All rows so far, without truncated lines."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows


def bad(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] not in GOOD]


def describe(row: Row) -> str:
    """One line."""
    words = [row[name] for name in ("operator", "backend", "direction", "dtype", "size", "check") if row.get(name)]
    numbers = [f"{name} {row[name]}" for name in ("variant", "ratio", "ms", "host_us") if name in row]
    last = row.get("detail", "").strip().splitlines()
    return " ".join([row["status"], *words, *numbers]) + (f": {last[-1][:200]}" if last else "")
