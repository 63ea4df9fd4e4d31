"""Calls samples once on a GPU, for compute-sanitizer: python tests/kernel_tools/once.py BACKEND NAME ...; without names, all."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from kernel_tools.samples import with_backend  # noqa: E402
from ov3fast import ops  # noqa: E402


def main(backend: str, *names: str) -> None:
    with ops.use(backend):
        for dtype in (torch.float32, torch.bfloat16):
            for sample in with_backend(backend, dtype):
                if sample.name in names or not names:
                    sample.results(sample.inputs("tiny", dtype, "cuda"))
                    torch.cuda.synchronize()
                    print(sample.name, dtype, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
