"""The folder of a run that trains something on a frozen model (a generator, a language model) and keeps one checkpoint.

    recipe.json  log.jsonl  checkpoint/ (state.safetensors, progress.json)

Pretraining runs keep several checkpoints, sharded over their processes: training.checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ov3fast.io import atomic_folder, atomic_write, check_writable_folder

RECIPE, CHECKPOINT = "recipe.json", "checkpoint"
STATE, PROGRESS = "state.safetensors", "progress.json"


class Runnable(Protocol):
    """A recipe: a dataclass with a run_dir."""

    run_dir: Path


def check_run_dir(recipe: Runnable, *, resume: bool, overwrite: bool, may_change: Collection[str]) -> bool:
    """Whether recipe.run_dir holds a checkpoint to resume from. Writes nothing.

    may_change: the fields in which a resumed run's recipe may differ. FileExistsError if there is a run and neither `resume` nor
    `overwrite`; ValueError, naming the field, if the run to resume has another recipe; OSError if the folder can't be written.
    """
    run_dir = check_writable_folder(recipe.run_dir, "run_dir")
    if not (run_dir / RECIPE).is_file():
        return False
    if not resume:
        if not overwrite:
            raise FileExistsError(f"run_dir: {run_dir} holds a run; --resume continues it, --overwrite starts over")
        return False
    before = json.loads((run_dir / RECIPE).read_text(encoding="utf-8"))
    for name, value in _plain(recipe).items():
        if name not in may_change and value != before.get(name):
            raise ValueError(
                f"resume: {name} is {value!r}, but {run_dir} was started with {before.get(name)!r}; keep that, or name another run_dir"
            )
    return (run_dir / CHECKPOINT).is_dir()


def start_run(recipe: Runnable, resumed: bool, result: str) -> None:
    """Writes the recipe. Unless `resumed`, first removes what a former run left: its checkpoint, and the folder `result` in run_dir."""
    if not resumed:
        for name in (CHECKPOINT, result):
            shutil.rmtree(recipe.run_dir / name, ignore_errors=True)
    with atomic_write(recipe.run_dir / RECIPE) as temporary:
        temporary.write_text(json.dumps(_plain(recipe), indent=1), encoding="utf-8")


def save_checkpoint(folder: Path, groups: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> None:
    """groups: tensors by name, for each of weights, moments, ..."""
    from safetensors.torch import save_file

    state = {f"{group}/{name}": value.detach().contiguous() for group, of in groups.items() for name, value in of.items()}
    with atomic_folder(folder) as temporary:
        save_file(state, temporary / STATE)
        (temporary / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save_checkpoint` was given; a group without tensors is absent."""
    from safetensors.torch import load_file

    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / STATE).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups, json.loads((folder / PROGRESS).read_text(encoding="utf-8"))


def _plain(recipe: Any) -> dict[str, Any]:
    """The recipe as JSON holds it."""
    return json.loads(json.dumps(asdict(recipe), default=str))
