"""The fraction of the error budget (ov3fast.testing) that each Triton kernel uses, in Triton's interpreter: python -m tools.parity [OPERATOR ...]

Every operator, forward and backward, in float32 and bfloat16, at the tiny sizes of its CALLS: a few programs per launch, with ragged edges. Writes
benches/results/parity-interpreter.csv; exits with 1 if a ratio is above 1, that is, over the budget. On a GPU `tools/gpu_run.py correct` records the
same, also for float16 and real sizes.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

# Before anything imports Triton.
os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benches" / "results" / "parity-interpreter.csv"
COLUMNS = ("operator", "call", "direction", "dtype", "size", "ratio")


def main(arguments: list[str] | None = None) -> int:
    from ov3fast import ops
    from tools.gpu.correct import parity
    from tools.gpu.setting import DTYPES, samples

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help="default: all")
    parser.add_argument("--size", choices=("least", "tiny"), default="tiny")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rows = []
    for sample in samples().SAMPLES:
        if options.operators and sample.op not in options.operators:
            continue
        for name, dtype in DTYPES.items():
            if not sample.takes("triton", dtype):
                continue
            with ops.use("triton"):
                for found in parity(sample, options.size, name):
                    size = "x".join(map(str, sample.sizes[options.size]))
                    values = (sample.op, sample.name, found["direction"], name, size, f"{found['ratio']:.3f}")
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
                    print(*values, flush=True)
    if not rows:
        parser.error(f"no Triton kernel of {', '.join(options.operators)}")
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return int(any(float(row["ratio"]) > 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
