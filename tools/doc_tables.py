"""Regenerates the tables in docs/ from benches/results and the code, between `<!-- table: NAME -->` and `<!-- end -->`.

    python tools/doc_tables.py        # after a CSV file in benches/results has changed; a test checks that they are up to date

NAME is `environment`, `step`, `certificates`, `optimize`, `int8`, `serve`, `serve_memory`, `pretrain`, `index` (the list of operators), `operators`
(every row), `amx` (rows measured on that chip), or the name of one operator.
"""

import ast
import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path

from ov3fast import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = ("", "size", "dtype", "ms", "rate", "of roofline", "best peer", "ratio")


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(row: dict[str, str]) -> list[str]:
    ratio = row["ratio"] + " x" if row["ratio"] else ""
    return [
        row["direction"],
        row["shape"],
        row["dtype"],
        f"{float(row['ms']):,.1f}",
        row["rate"],
        row["of_floor"],
        row["best_peer"],
        ratio,
    ]


def extra_memory(row: dict[str, str]) -> str:
    return f"{row['extra_mb']} ({row['peer_extra_mb'] or '-'})" if row["extra_mb"] else ""


def measured_on(row: dict[str, str]) -> str:
    return f"Measured on {row['cpu']} ({row['isa']}), {row['threads']} threads, torch {row['torch']}, commit {row['commit']}."


def machine(rows: list[dict[str, str]]) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"Measured on {rows[0]['cpu']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}, commits {commits}.\n\n"


def index() -> list[tuple[str, str]]:
    """Each page in docs/operators with the first sentence of its module's docstring."""
    rows = []
    for name in sorted(page.stem for page in (ROOT / "docs" / "operators").glob("*.md") if page.stem != "index"):
        heading = (ROOT / "docs" / "operators" / f"{name}.md").read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
        module = ast.parse((ROOT / "ov3fast" / "ops" / f"{name}.py").read_text(encoding="utf-8"))
        first = (ast.get_docstring(module) or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".:")
        rows.append((f"[`{heading}`]({name}.md)", first))
    return rows


def certificates() -> Iterable[list[str]]:
    """One row per exported file of the committed certificates."""
    path = RESULTS / "certificates.json"
    for format, values in (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}).items():
        for file, part in values["parts"].items():
            errors = ", ".join(f"{name} {error:.1e}" for name, error in part["max_error"].items())
            yield [format, f"`{file}`", values["runtime"], errors]


def render(page: str) -> str:
    operators = read("operators-cpu-zen4.csv")

    def fill(block: re.Match[str]) -> str:
        name = block[2]
        if name == "environment":
            words = [(f"`{word}`", text.meaning, text.default) for word, text in environment.WORDS.items()]
            made = table(("variable", "meaning", "default"), words)
        elif name == "index":
            made = table(("operator", "what it computes"), index())
        elif name == "step":
            head, *rest = read("step.csv")
            made = table(head, [list(row.values()) for row in (head, *rest)])
        elif name == "operators":
            rows = [[row["operator"], *cells(row), row["target"], row["chosen"], extra_memory(row)] for row in operators]
            made = measured_on(operators[0]) + "\n\n" + table(("operator", *HEAD, "target", "chosen", "extra MB (peer)"), rows)
        elif name == "certificates":
            made = table(("format", "file", "runtime", "largest difference from eager"), certificates())
        elif name in ("optimize", "serve", "serve_memory"):
            rows = read(f"{name.replace('_', '-')}.csv")
            made = table(rows[0], [row.values() for row in rows]) if rows else "No row yet."
        elif name == "int8":
            head = ("", "images", "float32", "bfloat16", "int8", "int8 to bfloat16")
            made = table(head, [list(row.values())[: len(head)] for row in read("int8.csv")])
        elif name == "pretrain":
            rows = read("pretrain-zen4.csv")
            head = ("what", "", "value", "unit", "floor", "ratio", "asked", "")
            keys = ("what", "variant", "value", "unit", "floor", "ratio", "asked", "note")
            made = (machine(rows) + table(head, [[row[key] for key in keys] for row in rows])) if rows else "No row yet."
        elif name == "amx":
            rows = [
                [row["operator"], *cells(row)[:3], row["ms"], row["peer_ms"], row["ratio"]]
                for row in read("operators-cpu-amx.csv")
            ]
            made = table(("operator", "", "size", "dtype", "ms, our kernels", "ms, PyTorch's best", "ratio"), rows)
        else:
            rows = [row for row in operators if row["operator"].split()[0] == name]
            made = measured_on(rows[0]) + "\n\n" + table(HEAD, map(cells, rows)) if rows else "No row yet."
        return f"{block[1]}\n{made}\n\n{block[3]}"

    return BLOCK.sub(fill, page)


def pages() -> list[Path]:
    return sorted((ROOT / "docs").rglob("*.md"))


if __name__ == "__main__":
    for path in pages():
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
