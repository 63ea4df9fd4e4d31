"""Regenerates the tables in docs/kernels.md, between `<!-- tables: OPERATOR ... -->` and `<!-- end -->`.

python -m benches.kernel_page        # after benches/results/kernels-aot.csv or operators-cpu-zen4.csv has changed
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from ov3fast.kernels.aot import table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
AOT = ROOT / "benches" / "results" / "kernels-aot.csv"
CPU = ROOT / "benches" / "results" / "operators-cpu-zen4.csv"

_BLOCK = re.compile(r"(<!-- tables: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def render(text: str, compiled: list[dict[str, str]], measured: list[dict[str, str]]) -> str:
    """The page with its tables regenerated from the rows of the two CSV files."""

    def fill(block: re.Match[str]) -> str:
        ops = block[2].split()
        ours = [row for row in compiled if row["op"] in ops]
        parts = [table.markdown(ours)] if ours else []
        lines = [_on_cpu(row) for row in measured if row["operator"].split()[0] in ops]
        if lines:
            parts.append(
                "\n".join(
                    [
                        f"The CPU kernels of the same operator ({measured[0]['cpu']}, {measured[0]['threads']} threads):\n",
                        *lines,
                    ]
                )
            )
        return block[1] + "".join(f"\n{part}\n" for part in parts) + ("\n" if parts else "") + block[3]

    return _BLOCK.sub(fill, text)


def _on_cpu(row: dict[str, str]) -> str:
    peer = f", {row['ratio']} x {row['best_peer']}" if row["ratio"] else ""
    return f"- {row['direction']}, {row['shape']}, {row['dtype']}: {float(row['ms']):.3g} ms, {row['rate']}, {row['of_floor']} of roofline{peer}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read(AOT), read(CPU)), encoding="utf-8")
