"""Started by torchrun: the tiny recipe uninterrupted, and again with a SIGTERM to one rank and a resume.

torchrun ... two_ranks.py FOLDER OUT
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch

from ov3fast.training import train
from ov3fast.training.optimizer import AdamW


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny_models" / "training_run.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    rank = int(os.environ["RANK"])
    results = [train(tiny.recipe(folder, out / "whole"))]

    zero_grad = AdamW.zero_grad

    def signalled(self):
        if self.steps == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return zero_grad(self)

    AdamW.zero_grad = signalled
    results.append(train(tiny.recipe(folder, out / "stopped")))
    AdamW.zero_grad = zero_grad
    results.append(train(tiny.recipe(folder, out / "stopped"), resume=True))
    (out / f"rank-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
