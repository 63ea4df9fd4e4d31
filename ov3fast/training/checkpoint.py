"""Checkpoints that survive a kill at any moment: finding, checking and reading them (saving.py writes them).

    <checkpoint_dir>/step-00001200/__0_0.distcp __1_0.distcp ... .metadata  state.json  manifest.json

The tensors are torch.distributed.checkpoint's: each process writes the shares that it holds, and any number of processes reads them. A
tensor's name is "group/name": model/..., optimizer/... and ema/.... manifest.json holds the sha256 of every tensor's bytes in every file,
and of the other files, so that truncation and corruption are detected, and named, on reading. A local checkpoint is written to a hidden folder
and renamed; elsewhere (s3://, gs://) manifest.json comes last. In both a checkpoint without a manifest is none.

Earlier versions wrote model.safetensors, optimizer.safetensors and ema.safetensors; these are read too.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from ov3fast.training.distributed import ALONE, Ranks
from ov3fast.training.parallel import place

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"
STEP = re.compile(PREFIX + r"(\d{8,})")


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was skipped; the message names it and says why."""


class Folder:
    """A folder on a local disk or at an fsspec URL."""

    def __init__(self, where: str | Path) -> None:
        self.fs, root = fsspec.core.url_to_fs(str(where))
        self.root = root.rstrip("/")
        self.local = "file" in self.fs.protocol
        self.url = self.root if self.local else self.fs.unstrip_protocol(self.root)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.root.rpartition("/")[2]

    def names(self) -> list[str]:
        """Of what the folder holds; [] where it is none."""
        self.fs.invalidate_cache(self.root)
        if not self.fs.isdir(self.root):
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False))

    def has(self, name: str) -> bool:
        return self.fs.exists(f"{self.root}/{name}")

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        return self.fs.size(f"{self.root}/{name}") if self.fs.isfile(f"{self.root}/{name}") else None

    def open(self, name: str, mode: str = "rb") -> Any:
        return self.fs.open(f"{self.root}/{name}", mode)

    def read_json(self, name: str) -> Any:
        with self.open(name) as file:
            return json.loads(file.read().decode("utf-8"))

    def sha256(self, name: str, offset: int = 0, length: int | None = None) -> str:
        """Of a file, or of `length` bytes of it from `offset` on."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            file.seek(offset)
            left = length
            while chunk := file.read(1 << 20 if left is None else min(1 << 20, left)):
                digest.update(chunk)
                left = None if left is None else left - len(chunk)
        return digest.hexdigest()


@dataclass
class Checkpoint:
    """A checkpoint that passed its checks."""

    folder: Folder
    state: dict[str, Any]
    """The JSON object that was saved with the tensors."""
    manifest: dict[str, Any]

    @property
    def path(self) -> Path:
        return Path(str(self.folder))

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All of them, whole and on the CPU: group -> name -> tensor."""
        if self.former:
            return _former_tensors(self)
        flat = {name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"])) for name, entry in self.saved.items()}
        _read(self.folder, flat, ALONE)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in flat.items():
            group, _, own_name = name.partition("/")
            groups.setdefault(group, {})[own_name] = value
        return groups

    @property
    def former(self) -> bool:
        """Whether an earlier version wrote it."""
        return "tensors" not in self.manifest

    @property
    def saved(self) -> dict[str, Any]:
        """group/name -> shape, dtype and chunks."""
        return self.manifest["tensors"]

    def restore(self, group: str, into: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Reads a group into tensors of the same names and shapes, each rank its shares. ValueError names the first that does not fit."""
        prefix = f"{group}/"
        if self.former:
            given = {name: tuple(value.shape) for name, value in self.tensors.get(group, {}).items()}
        else:
            given = {
                name.removeprefix(prefix): tuple(entry["shape"])
                for name, entry in self.saved.items() if name.startswith(prefix)
            }  # fmt: skip
        for name in [*into, *(name for name in given if name not in into)]:
            if name not in given or name not in into:
                raise ValueError(
                    f"{group}: {name} is {'missing from' if name in into else 'unknown to this model, but in'} the checkpoint"
                )
            if tuple(into[name].shape) != given[name]:
                raise ValueError(f"{group}: {name} has shape {given[name]} in the checkpoint, {tuple(into[name].shape)} here")
        if self.former:
            for name, value in into.items():
                place(value, self.tensors[group][name])
        else:
            _read(self.folder, {prefix + name: value for name, value in into.items()}, ranks)


def steps(where: str | Path | Folder) -> list[int]:
    """The steps that have a checkpoint folder, or a link to one, ascending; it may still be a broken one.

    Only names that a save makes count: step- and eight or more digits.
    """
    folder = where if isinstance(where, Folder) else Folder(where)
    found = ((name, STEP.fullmatch(name)) for name in folder.names())
    return sorted(int(match[1]) for name, match in found if match and folder.fs.isdir(f"{folder.root}/{name}"))


def latest(where: str | Path | Folder, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The newest checkpoint that is whole; a CheckpointWarning for each newer one that is not. None if there are no checkpoints.

    The ranks share the checking and find the same. ValueError if there are checkpoints and none is whole.
    """
    folder = where if isinstance(where, Folder) else Folder(where)
    broken = []
    for step in reversed(steps(folder)):
        name = f"{PREFIX}{step:08d}"
        try:
            return load(folder / name, ranks)
        except ValueError as error:
            warnings.warn(f"checkpoint passed over: {error}", CheckpointWarning, stacklevel=2)
            broken.append(name)
    if broken:
        raise ValueError(f"checkpoints: none of {', '.join(broken)} in {folder} is whole; remove them to start anew")
    return None


def load(where: str | Path | Folder, ranks: Ranks = ALONE) -> Checkpoint:
    """Checks one checkpoint. ValueError, on every rank, naming the tensor or file that is missing, cut or changed."""
    folder = where if isinstance(where, Folder) else Folder(where)
    try:
        manifest = folder.read_json(MANIFEST)
        manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem: str | None = f"{folder}/{MANIFEST} can't be read ({type(error).__name__})"
    else:
        problem = next(problems(folder, manifest, ranks.rank, ranks.world), None)
    found = [text for text in ranks.gather(problem) if text is not None]
    if found:
        raise ValueError(found[0])
    return Checkpoint(folder, folder.read_json(STATE), manifest)


def problems(folder: Folder, manifest: Mapping[str, Any], part: int = 0, parts: int = 1) -> Iterator[str]:
    """Mismatches with the manifest, one sentence each; `part` of `parts` reads its share of the bytes."""
    for name, entry in manifest["files"].items():
        size = folder.size(name)
        if size is None:
            yield f"{folder}/{name} is missing"
        elif size != entry["bytes"]:
            yield f"{folder}/{name} has {size} bytes, the manifest says {entry['bytes']}"
        elif "sha256" in entry and folder.sha256(name) != entry["sha256"]:
            yield f"{folder}/{name} is not what was written: its sha256 differs from the manifest's"
    chunks = [(name, chunk) for name, entry in manifest.get("tensors", {}).items() for chunk in entry["chunks"]]
    for name, chunk in chunks[part::parts]:
        if folder.sha256(chunk["file"], chunk["offset"], chunk["bytes"]) != chunk["sha256"]:
            yield (
                f"{folder}: tensor {name} is not what was written: {chunk['file']} was changed or cut within the {chunk['bytes']} bytes "
                f"from {chunk['offset']} on"
            )


def difference(a: Checkpoint, b: Checkpoint) -> list[tuple[str, str]]:
    """(tensor, how the second's differs from the first's) for every tensor that does, by name."""
    found = []
    ours, theirs = (
        {f"{group}/{name}": value for group, values in c.tensors.items() for name, value in values.items()} for c in (a, b)
    )
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs:
            found.append((name, f"only in {(a if name in ours else b).folder}"))
            continue
        x, y = ours[name], theirs[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            found.append((name, f"{x.dtype} {tuple(x.shape)} against {y.dtype} {tuple(y.shape)}"))
        elif not torch.equal(x, y):
            change = (x.double() - y.double()).abs()
            largest = x.double().abs().max()
            found.append(
                (name, f"{int((x != y).sum())} of {x.numel()} values, by {change.max():.3g} at most (largest {largest:.3g})")
            )
    return found


def _former_tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    from safetensors.torch import load as parse

    groups = {}
    for name in checkpoint.manifest["files"]:
        if name.endswith(".safetensors"):
            with checkpoint.folder.open(name) as file:
                groups[name.removesuffix(".safetensors")] = parse(file.read())
    return groups


def _read(folder: Folder, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    reader = dcp.FileSystemReader(folder.root) if folder.local else FsspecReader(folder.url)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=ranks.control, no_dist=ranks.group is None)
