"""Tests, times and diagnoses all kernels on a GPU in half an hour, from a source tree without installation: three plans of at most nine minutes.

    python tools/gpu_run.py correct --out DIR      # errors over budget, determinism, captured graphs
    python tools/gpu_run.py time --out DIR         # each operator by graph replay: ours by automatic choice and by name, PyTorch's
    python tools/gpu_run.py diagnose --out DIR     # compute-sanitizer, Nsight Compute, reruns of what failed in `correct`
    python tools/gpu_run.py PLAN --out DIR --rehearse      # the same at tiny sizes without a GPU, in Triton's interpreter

Needs torch, triton, numpy and the built libraries in ov3fast/_native (`OV3FAST_CUDA=1 python csrc/build.py ov3fast/_native`). Writes DIR/PLAN.jsonl, one
row at a time, and prints a summary at the end. Exits with 1 if anything failed, is missing or was not reached. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Replaces the script's own folder on sys.path, whose module names must not shadow packages.
sys.path[0] = str(ROOT)


def main(arguments: list[str] | None = None) -> int:
    from tools.gpu import plans

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=sorted(plans.PLANS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default="", help="only operators whose name contains this")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--minutes", type=float, default=plans.MINUTES, help="when to stop (default: %(default)s)")
    options = parser.parse_args(arguments)
    return plans.run(options.plan, options.out, only=options.only, rehearse=options.rehearse, minutes=options.minutes)


if __name__ == "__main__":
    sys.exit(main())
