"""Writing checkpoints while the run goes on.

    saver = Saver(checkpoint_dir, ranks, keep=2)
    saver.save(step, {"model": ..., "optimizer": ..., "ema": ...}, state)       returns at once
    saver.copied()                  before the tensors change: waits until they are copied to the CPU
    saver.finish()                  waits until the checkpoint is there; raises what went wrong

A thread copies the tensors, which stay as they are until the next update of the weights, while the next step's passes run; then every
process writes its part. Of what all processes hold, each copies and writes a share. Processes agree over a gloo group of the saver's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ov3fast.io import naming_full_disk
from ov3fast.training.checkpoint import MANIFEST, PREFIX, STATE, STEP, Folder, steps
from ov3fast.training.distributed import ALONE, Ranks

TIME_LIMIT = timedelta(hours=1)
"""How long a process waits for the others to have written their parts."""
_WRITING = "writing-0"
_LEFTOVER = re.compile(r"\.(?:step-\d{8,}\.(?:writing|replaced)-\d+|(?:writing|replaced)-\d{8})")


class Saver:
    """Saves checkpoints to a folder or fsspec URL, one at a time.

    keep: the newest that stay; keep_every: those of every so many steps stay too.
    """

    def __init__(self, where: str | Path, ranks: Ranks = ALONE, *, keep: int = 2, keep_every: int | None = None) -> None:
        self.folder, self.ranks, self.keep, self.keep_every = Folder(where), ranks, keep, keep_every
        self.group = None if ranks.group is None else dist.new_group(backend="gloo", timeout=TIME_LIMIT)
        on_gpu = ranks.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_non_blocking_copy=on_gpu, use_async_staging=True
            )
        )
        self._staged: Future[None] | None = None
        self._written: Future[Any] | None = None
        self._step, self._began = 0, 0.0
        self.longest = 0.0
        """Seconds of the longest save so far, from its start to the checkpoint's being there."""
        # A run of one process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Starts writing step-<step>, once the save before has ended. `tensors`: group -> name -> tensor, whole or sharded."""
        self.finish()
        flat = {f"{group}/{name}": value.detach() for group, values in tensors.items() for name, value in values.items()}
        share = self._share(flat)
        own = {name: value for name, value in flat.items() if hasattr(value, "to_local") or name in share}
        self._step, self._began = step, time.monotonic()
        writer = _writer(self, step, state)
        response = dcp.async_save(
            own, storage_writer=writer, process_group=self.group, async_stager=self._stager, no_dist=self.group is None
        )
        self._staged, self._written = response.staging_completion, response.upload_completion

    def copied(self) -> None:
        """Returns when the tensors may change."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed, with an error that `finish` raises."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def finish(self) -> None:
        """Returns when the last save is done; raises its error, OSError naming the folder where the disk is full."""
        written, self._written, self._staged = self._written, None, None
        if written is None:
            return
        path = f"{self.folder}/{PREFIX}{self._step:08d}"
        try:
            with naming_full_disk(path, "the checkpoint before is whole"):
                try:
                    written.result()
                except CheckpointException as error:
                    raise next(iter(error.failures.values()))[0] from None
        except BaseException:
            if self.ranks.first and self.folder.local:
                shutil.rmtree(f"{self.folder.root}/.{PREFIX}{self._step:08d}.{_WRITING}", ignore_errors=True)
            raise
        self.longest = max(self.longest, time.monotonic() - self._began)

    def close(self) -> None:
        """Ends the copying thread; abandons a save in progress unless `finish` was called."""
        self._stager.close()

    def _share(self, flat: Mapping[str, Tensor]) -> set[str]:
        """Names of the whole tensors that this rank writes: every rank about as many bytes."""
        loads = [0] * self.ranks.world
        own = set()
        for name, value in sorted(flat.items(), key=lambda item: -item[1].numel()):
            if not hasattr(value, "to_local"):
                rank = loads.index(min(loads))
                loads[rank] += value.numel() * value.element_size()
                if rank == self.ranks.rank:
                    own.add(name)
        return own

    def _remove_old(self) -> None:
        present = steps(self.folder)
        for step in present[: -self.keep]:
            if self.keep_every is None or step % self.keep_every:
                self._remove(f"{PREFIX}{step:08d}")

    def _remove_leftovers(self) -> None:
        """Removes what a killed save left; nothing else is touched."""
        for name in self.folder.names():
            if _LEFTOVER.fullmatch(name):
                self._remove(name)
            elif not self.folder.local and STEP.fullmatch(name) and not (self.folder / name).has(MANIFEST):
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Removes a checkpoint, or a link to one but not what it points to."""
        path = f"{self.folder.root}/{name}"
        if self.folder.local and os.path.islink(path):
            os.unlink(path)
        else:
            self.folder.fs.rm(path, recursive=True)


def save(
    where: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Writes a checkpoint by this process alone and returns its folder."""
    saver = Saver(where, keep=keep)
    try:
        saver.save(step, tensors, state)
        saver.finish()
    finally:
        saver.close()
    return Path(f"{saver.folder}/{PREFIX}{step:08d}")


class _Hashed:
    """Part of a writer: notes each tensor's sha256 as it lies in the file, and completes the checkpoint when all ranks have written."""

    def begin(self, saver: Saver, step: int, state: Mapping[str, Any]) -> None:
        self.saver, self.step, self.state = saver, step, state

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)  # type: ignore[misc]
        if is_coordinator:
            self.saver._remove_leftovers()

    def write_data(self, plan: Any, planner: Any) -> Any:
        future = super().write_data(plan, planner)  # type: ignore[misc]
        folder = Folder(str(self.path))
        for result in future.value():
            info = result.storage_data
            # Travels to the first rank with the rest of what it is told about a chunk.
            info.sha256 = folder.sha256(info.relative_path, info.offset, info.length)
        return future

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)  # type: ignore[misc]
        folder = Folder(str(self.path))
        _write(folder, STATE, self.state)
        tensors: dict[str, Any] = {
            name: {"shape": list(entry.size), "dtype": str(entry.properties.dtype).removeprefix("torch."), "chunks": []}
            for name, entry in metadata.state_dict_metadata.items()
        }
        for result in sorted((r for own in results for r in own), key=lambda r: (r.index.fqn, tuple(r.index.offset or ()))):
            info = result.storage_data
            chunk = {"file": info.relative_path, "offset": info.offset, "bytes": info.length, "sha256": info.sha256}
            tensors[result.index.fqn]["chunks"].append({"start": list(result.index.offset or ()), **chunk})
        files = {name: {"bytes": folder.size(name)} for name in folder.names()}
        for name in files:
            if not name.endswith(".distcp"):
                files[name]["sha256"] = folder.sha256(name)
        _write(folder, MANIFEST, {"step": self.step, "files": files, "tensors": tensors})
        if folder.local:
            _replace(Path(folder.root), Path(self.saver.folder.root) / f"{PREFIX}{self.step:08d}")
        self.saver._remove_old()


class _LocalWriter(_Hashed, dcp.FileSystemWriter):
    pass


class _RemoteWriter(_Hashed, FsspecWriter):
    pass


def _writer(saver: Saver, step: int, state: Mapping[str, Any]) -> Any:
    name = f"{PREFIX}{step:08d}"
    if saver.folder.local:
        writer: Any = _LocalWriter(f"{saver.folder.root}/.{name}.{_WRITING}")
    else:
        writer = _RemoteWriter(f"{saver.folder.url}/{name}")
    writer.begin(saver, step, state)
    return writer


def _write(folder: Folder, name: str, values: Any) -> None:
    with folder.open(name, "wb") as file:
        file.write((json.dumps(values, indent=1) + "\n").encode("utf-8"))
        if folder.local:
            file.flush()
            os.fsync(file.fileno())


def _replace(written: Path, path: Path) -> None:
    """A step saved twice (on a signal, right after a regular save) replaces the former, which holds the same."""
    retired = path.with_name(f".{path.name}.replaced-0")
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        os.replace(path, retired)
    _sync(written)
    os.replace(written, path)
    _sync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
