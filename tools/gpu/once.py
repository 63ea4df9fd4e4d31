"""Calls samples once, to be run under a sanitizer or profiler: python -m tools.gpu.once BACKEND [--real] [NAME ...]; default: all samples.

BACKEND "any" means the automatic choice.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch

from ov3fast import ops

from .setting import DEVICE, SIZES, samples, synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--real", action="store_true", help="at sizes from training, only in bfloat16")
    options = parser.parse_args()
    backend = None if options.backend == "any" else options.backend
    with ops.use(backend) if backend else nullcontext():
        for dtype in (torch.bfloat16,) if options.real else (torch.float32, torch.bfloat16):
            for sample in samples().SAMPLES:
                if (not options.names or sample.name in options.names) and (backend is None or sample.takes(backend, dtype)):
                    sample.results(sample.inputs("real" if options.real else SIZES[0], dtype, DEVICE))
                    synchronize()
                    print(sample.name, dtype, flush=True)


if __name__ == "__main__":
    main()
