"""Benchmarks in their published formats, from folders on this machine: read(folder) -> items, score(items, replies) -> figures.

    name         figures                                    of
    pope         f1 (mean of the splits), accuracy, ...     coco_pope_*.json and the images of COCO val2014
    gqa          accuracy, binary, open                     testdev_balanced_questions.json and images/
    seed         accuracy, and by type                      SEED-Bench.json and SEED-Bench-image/ (videos are left out)
    mme          perception, cognition, and by category     MME_Benchmark_release_version/
    scienceqa    accuracy                                   problems.json, pid_splits.json and test/ (questions with an image)

Prompts are LLaVA-1.5's, and a reply is read by the rules that the benchmark or LLaVA published, so that figures are those that papers print. The
same model still differs between harnesses: run the control in the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ov3fast.understanding.benchmarks.item import Item

NAMES = ("pope", "gqa", "seed", "mme", "scienceqa")


class Benchmark(NamedTuple):
    name: str
    read: Callable[[Path], list[Item]]
    score: Callable[[Sequence[Item], Sequence[str]], dict[str, float]]


def benchmark(name: str) -> Benchmark:
    """ValueError for a name that is none of NAMES."""
    if name not in NAMES:
        raise ValueError(f"benchmark must be one of {', '.join(NAMES)}; got {name!r}")
    module = import_module(f"ov3fast.understanding.benchmarks.{name}")
    return Benchmark(name, module.read, module.score)
