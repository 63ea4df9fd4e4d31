"""Checkpoints that survive a kill at any moment.

    <run_dir>/checkpoints/step-00001200/{model,optimizer,ema}.safetensors  state.json  manifest.json

A checkpoint is written to a hidden folder, every file synced to disk, then renamed: it is there whole or not at all, and the
one before stays until then. manifest.json holds the sha256 of every other file, so that a cut or changed one is noticed on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ov3fast.io import atomic_folder

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"
_STEP = re.compile(PREFIX + r"(\d{8,})")
_LEFTOVER = re.compile(r"\.(?:step-\d{8,}\.(?:writing|replaced)-\d+|(?:writing|replaced)-\d{8})")
_FORMER = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", STATE, MANIFEST)


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped; the message names it and says why."""


class Checkpoint(NamedTuple):
    """What was saved: groups of named CPU tensors, and a JSON object."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2) -> Path:
    """Writes <folder>/step-<step>, then removes all but the newest `keep`. `tensors`: file name -> name -> tensor."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    # A step saved twice (on a signal, right after a regular save) replaces the former, which holds the same.
    with atomic_folder(folder / f"{PREFIX}{step:08d}", former=_FORMER) as temporary:
        for name, group in tensors.items():
            values = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(values, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        files = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
    _sync(folder)
    for old in steps(folder)[:-keep]:
        _remove(folder / f"{PREFIX}{old:08d}")
    return folder / f"{PREFIX}{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint folder, or a link to one, ascending; it may still be a broken one.

    Only names that `save` makes count: step- and eight or more digits.
    """
    found = (_STEP.fullmatch(path.name) for path in folder.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed `save` left; nothing else is touched."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    """A checkpoint, or the link to one: what a link points to is not ours to remove."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a CheckpointWarning for each newer one that is not. None if there are no checkpoints.

    ValueError if there are checkpoints and none is whole.
    """
    broken = []
    for step in reversed(steps(folder)):
        path = folder / f"{PREFIX}{step:08d}"
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"checkpoint passed over: {error}", CheckpointWarning, stacklevel=2)
            broken.append(path.name)
    if broken:
        raise ValueError(f"checkpoints: none of {', '.join(broken)} in {folder} is whole; remove them to start anew")
    return None


def load(path: Path) -> Checkpoint:
    """Reads and checks one checkpoint. ValueError, naming the file, for what is missing, cut or changed."""
    from safetensors.torch import load_file

    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} can't be read ({type(error).__name__})") from None
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise ValueError(f"{file} is not what was written: its sha256 differs from the manifest's")
    tensors = {Path(name).stem: load_file(path / name) for name in files if name.endswith(".safetensors")}
    return Checkpoint(path, tensors, json.loads((path / STATE).read_text(encoding="utf-8")))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
