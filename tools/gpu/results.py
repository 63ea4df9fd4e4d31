"""Imports the results of a run on a GPU: python -m tools.gpu.results DIR

Writes benches/results/operators-cuda.csv and step-cuda.csv (full encoders) from time.jsonl, parity-cuda.csv from correct.jsonl, profiles-cuda.csv
from diagnose.jsonl, kernels/measured.csv (the configurations that won, which kernels use from then on), and the README's sentence
about what has run on a GPU. Tables whose file is missing in DIR are left alone; results of a rehearsal are rejected.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from ov3fast.io import atomic_write
from ov3fast.kernels.lib import config as configs

from .jobs import ROOT
from .rows import Row, Rows, bad

RESULTS = ROOT / "benches" / "results"
README = ROOT / "README.md"
STATUS = re.compile(r"\*\*(Nothing here has (?:been )?run on a GPU yet|Run on a GPU: [^*]*?)\.?\*\*")
OURS = ("ov3fast", "triton", "cuda")
GAIN = 0.97
"""A configuration must take less than this fraction of the previous one's time."""


def facts(rows: Iterable[Row]) -> dict[str, str]:
    """The run's description of its machine. Raises ValueError for a rehearsal, and if there is none."""
    found = next((row["facts"] for row in rows if row["operator"] == "machine" and row["check"] == "facts"), None)
    if found is None:
        raise ValueError("the rows don't say on which machine they were made: the run was stopped before it began")
    if found.get("rehearsal") or "gpu" not in found:
        raise ValueError("these rows are a rehearsal's: nothing in them was measured on a GPU")
    return {name: str(found[name]) for name in ("gpu", "driver", "cuda", "torch", "triton", "commit")}


def operator_table(rows: list[Row]) -> list[dict[str, str]]:
    """One line per case, with the columns of operators-cpu-zen4.csv as far as known, plus our time per backend and host time."""
    machine, rates = (
        facts(rows),
        {row["dtype"] or row["size"]: row["rate"] for row in rows if row["check"] == "rate" and "rate" in row},
    )
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["check"] == "time" and "ms" in row:
            cases.setdefault(tuple(row[k] for k in ("operator", "direction", "size", "dtype")), {})[row["variant"]] = row
    return [line for key, variants in cases.items() if "ov3fast" in variants for line in [_line(key, variants, rates, machine)]]


def _line(key: tuple[str, ...], variants: dict[str, Row], rates: dict[str, float], machine: dict[str, str]) -> dict[str, str]:
    ours = variants["ov3fast"]
    seconds = ours["ms"] / 1e3
    peers = {name: row["ms"] for name, row in variants.items() if name not in OURS}
    best = min(peers, key=peers.get, default="")
    floor = 0.0
    if rates:
        floor = max(ours["flops"] / rates.get(key[3], float("inf")), ours["bytes"] / rates.get("copy", float("inf")))
    return {
        **dict(zip(("operator", "direction", "shape", "dtype"), key, strict=True)),
        **{name: f"{ours[name]:.4f}" for name in ("ms", "ms_q1", "ms_q3")},
        "host_us": f"{ours['host_us']:.1f}",
        "captured": str(ours["captured"]),
        "rate": f"{ours['flops'] / seconds / 1e12:.1f} TFLOP/s"
        if ours["flops"]
        else f"{ours['bytes'] / seconds / 1e9:.0f} GB/s",
        "of_floor": f"{floor / seconds:.2f}" if floor else "",
        "best_peer": best,
        "peer_ms": f"{peers[best]:.4f}" if best else "",
        "ratio": f"{peers[best] / ours['ms']:.2f}" if best else "",
        "target": "" if ours.get("target") is None else f"{ours['target']:g}",
        **{f"{name}_ms": f"{variants[name]['ms']:.4f}" if name in variants else "" for name in OURS[1:]},
        "peers": "; ".join(f"{name} {ms:.4f}" for name, ms in sorted(peers.items(), key=lambda item: item[1])),
        **machine,
    }


def parity_table(rows: list[Row]) -> list[dict[str, str]]:
    machine = facts(rows)
    columns = ("operator", "backend", "direction", "dtype", "size", "check", "status", "ratio")
    return [{**{name: str(row.get(name, "")) for name in columns}, **machine} for row in rows if row["operator"] != "machine"]


def profile_table(rows: list[Row]) -> list[dict[str, str]]:
    from .diagnose import METRICS

    machine = facts(rows)
    columns = ("operator", "kernel", *METRICS.values())
    return [
        {**{name: str(row.get(name, "")) for name in columns}, **machine}
        for row in rows
        if row["check"] == "profile" and "kernel" in row
    ]


def winners(rows: list[Row]) -> dict[tuple[str, ...], dict[str, str]]:
    """(kernel, dtype, size class, architecture) -> line of kernels/measured.csv, if a row beats the previous one over all cases together."""
    machine = facts(rows)
    shares: dict[tuple[str, ...], dict[str, dict[tuple[str, ...], float]]] = {}
    cases: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for row in rows:
        if row["check"] != "tune":
            continue
        key = tuple(row[name] for name in ("kernel", "kind", "size_class", "architecture"))
        case = tuple(row[name] for name in ("operator", "direction", "dtype", "size"))
        cases.setdefault(key, set()).add(case)
        if row["status"] == "ok":
            shares.setdefault(key, {}).setdefault(json.dumps(row["config"]), {})[case] = row["ms"] / row["before_ms"]
    found = {}
    for key, tried in shares.items():
        everywhere = {config: means for config, means in tried.items() if means.keys() == cases[key]}
        if not everywhere:
            continue
        mean = {config: math.prod(means.values()) ** (1 / len(means)) for config, means in everywhere.items()}
        best = min(mean, key=mean.__getitem__)
        if mean[best] < GAIN:
            row = json.loads(best)
            line = (*key, json.dumps(row["blocks"]), row["warps"], row["stages"], f"{mean[best]:.3f}")
            line += tuple(machine[name] for name in ("gpu", "torch", "triton", "commit"))
            found[key] = dict(zip(configs.COLUMNS, map(str, line), strict=True))
    return found


def sentence(correct: list[Row], timed: list[Row]) -> str:
    """The README's sentence, without the asterisks."""
    machine = facts(correct or timed)
    said = []
    if correct:
        checks = [row for row in correct if row["operator"] != "machine"]
        said.append(f"{len(checks) - len(bad(checks))} of {len(checks)} checks of correctness passed")
    if timed:
        said.append("times are in benches/results/operators-cuda.csv")
    return f"Run on a GPU: {machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, commit {machine['commit']}; {'; '.join(said)}"


def with_status(readme: str, words: str) -> str:
    """The README with its status sentence replaced. Raises ValueError if it has none."""
    text, count = STATUS.subn(lambda _: f"**{words}**", readme, count=1)
    if not count:
        raise ValueError(
            "README.md has no sentence in bold that begins with 'Nothing here has been run on a GPU yet' or 'Run on a GPU'"
        )
    return text


def write(rows: list[dict[str, str]], path: Path) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")


def take_over(folder: Path, results: Path = RESULTS, readme: Path = README, measured: Path = configs.MEASURED) -> None:
    """Imports a run. Raises FileNotFoundError if `folder` has none; nothing is written unless all files can be read."""
    found = {name: Rows(folder / f"{name}.jsonl").read() for name in ("correct", "time", "diagnose")}
    if not found["correct"] and not found["time"]:
        raise FileNotFoundError(f"{folder} holds neither correct.jsonl nor time.jsonl")
    tables = {}
    if found["time"]:
        lines = operator_table(found["time"])
        tables["operators-cuda.csv"] = [line for line in lines if not line["operator"].startswith("ViT")]
        tables["step-cuda.csv"] = [line for line in lines if line["operator"].startswith("ViT")]
    if found["correct"]:
        tables["parity-cuda.csv"] = parity_table(found["correct"])
    if found["diagnose"]:
        tables["profiles-cuda.csv"] = profile_table(found["diagnose"])
    rows_of_configuration = winners(found["diagnose"]) if found["diagnose"] else {}
    page = with_status(readme.read_text(encoding="utf-8"), sentence(found["correct"], found["time"]))
    for name, rows in tables.items():
        if rows:
            write(rows, results / name)
    if rows_of_configuration:
        with measured.open(newline="", encoding="utf-8") as file:
            before = {tuple(row[name] for name in configs.COLUMNS[:4]): row for row in csv.DictReader(file)}
        write(list((before | rows_of_configuration).values()), measured)
    with atomic_write(readme) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"written: {readme}")


if __name__ == "__main__":
    try:
        take_over(Path(sys.argv[1]))
    except (ValueError, FileNotFoundError) as reason:
        sys.exit(str(reason))
