"""Sampling speed of a generator: the tokens of one picture, size S with random weights, 50 Euler steps without guidance.

    python -m benches.sampling [--size S] [--precisions fp32 bf16 int8] [--out benches/results/sampling.csv]

Rows that are not measured again are kept. One row per precision: seconds for one picture and for a batch of two, the error of the first of the two relative to sampling it
alone (largest difference over largest value), and the error of either relative to float32.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch

from benches.timing import machine
from ov3fast.generation.ddt import build_generator, generator_config
from ov3fast.generation.flow import time_shift
from ov3fast.generation.saved import SavedGenerator
from ov3fast.generation.statistics import LatentStatistics
from ov3fast.io import atomic_write

STEPS = 50


def saved(size: str) -> SavedGenerator:
    """A generator with random weights everywhere, including layers that are zero-initialised for training."""
    torch.manual_seed(0)
    config = generator_config(size)
    generator = build_generator(config).eval().requires_grad_(False)
    for name, parameter in generator.named_parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02 if "modulation" in name else config.widths[1] ** -0.5)
    shape = (config.channels, config.height, config.width)
    statistics = LatentStatistics(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64), {})
    return SavedGenerator(generator, statistics, "", [], time_shift(shape))


def measure(size: str, precision: str, exact: torch.Tensor | None) -> tuple[dict[str, object], torch.Tensor]:
    of = saved(size)
    labels = torch.tensor([3, 5])

    def sample(count: int) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        found = of.sample(labels[:count], range(count), steps=STEPS, precision=precision)
        return found, time.perf_counter() - start

    of.sample(labels[:1], [0], steps=1, precision=precision)  # packed weights, int8's ranges
    alone, seconds = sample(1)
    both, seconds_of_two = sample(2) if precision != "fp32" else (alone, float("nan"))
    largest = float(alone.abs().max())
    row = {
        "generator": size,
        "steps": STEPS,
        "precision": precision,
        "seconds": f"{seconds:.2f}",
        "seconds_of_two": "" if precision == "fp32" else f"{seconds_of_two:.2f}",
        "batch_difference": "" if precision == "fp32" else f"{float((both[0] - alone[0]).abs().max()) / largest:.1e}",
        "from_fp32": "" if exact is None else f"{float((alone - exact).norm() / exact.norm()):.1e}",
    }
    return row, alone


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", default="S")
    options.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8"])
    options.add_argument("--out", type=Path, default=Path("benches/results/sampling.csv"))
    given = options.parse_args()
    rows, exact = [], None
    for precision in given.precisions:
        row, found = measure(given.size, precision, exact)
        exact = found if precision == "fp32" else exact
        rows.append(row | machine())
        print(row, flush=True)
    if given.out.is_file():
        measured = {row["precision"] for row in rows}
        with given.out.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["precision"] not in measured] + rows
    with atomic_write(given.out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
