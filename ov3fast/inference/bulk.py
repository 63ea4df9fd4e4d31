"""Bulk encoding: many images -> one embeddings file or a folder of them, in parts, by several processes, resumable after a kill.

    encode_many("runs/demo", find(["photos/"]), "vectors/", processes=2)

The images are split into parts of `rows`. Each part is encoded by one process and written atomically under its number, so parts that exist after a
kill are complete, and the same call does the rest. For a single file, the parts are kept in a folder beside it and joined at the end.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ov3fast.data.skips import DataError, SkipWarning
from ov3fast.inference.decoding import Options
from ov3fast.inference.embeddings import (
    INDEX,
    SUFFIXES,
    Embeddings,
    MappedFile,
    check_output,
    read_embeddings,
    read_head,
    write_embeddings,
)
from ov3fast.inference.encode import Job, Memory
from ov3fast.inference.load import VisionTower, load_model
from ov3fast.inference.sources import Sources
from ov3fast.io import atomic_write, check_writable_folder, naming_full_disk
from ov3fast.models import pretrained
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3

ROWS, ROWS_WITH_TOKENS = 4096, 512
"""Images of a part."""
JOB = "job.json"
Progress = Callable[[int, int], None]
"""(images done, images in total)."""


@dataclass(frozen=True)
class Plan:
    """A job's settings, the same in every process: how to load the model, and `encode`'s options."""

    model: str
    vae: str | None
    device: str | None
    dtype: str | None
    options: Options
    store: str
    rows: int
    suffix: str
    """Of a part's file."""

    def load(self) -> OpenVision3 | VisionTower:
        return load_model(self.model, vae=self.vae, device=self.device, dtype=self.dtype)


class Done(NamedTuple):
    """What a job wrote: images and skipped count everything, `resumed` the images that an earlier run had already done."""

    path: Path
    images: int
    skipped: dict[str, str]
    resumed: int
    seconds: float


def encode_many(
    model: str | Path,
    sources: Sources,
    out: str | Path,
    *,
    loaded: OpenVision3 | VisionTower | None = None,
    vae: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    image_size: int | None = None,
    batch_size: int = 32,
    workers: int = 2,
    tokens: bool = True,
    store: Literal["float32", "float16"] = "float32",
    processes: int = 1,
    rows: int | None = None,
    parts: str = ".safetensors",
    progress: Progress = lambda done, total: None,
) -> Done:
    """Encodes `sources` (see sources.find) with the model of a folder or hub id. loaded: that model, if it is already in memory.

    out: a file with one of embeddings.SUFFIXES, or else a folder, in which every part is a file with the suffix `parts` and index.json lists
    them. dtype: the model's; store: that of the output. processes: each has its own model and a share of the threads. rows: images
    per part. A run with the same arguments, model and images resumes an earlier one. ValueError for wrong arguments,
    FileExistsError if the folder holds something else, DataError if no image could be read, RuntimeError if a process died.
    """
    began = time.monotonic()
    out = Path(out).expanduser()
    single = out.suffix in SUFFIXES and not out.is_dir()
    tokens = tokens and (out.suffix if single else parts) != ".npy"
    _check(sources, out, single, processes, rows, parts, store)
    rows = rows or (ROWS_WITH_TOKENS if tokens else ROWS)
    options = Options(image_size=image_size, batch_size=batch_size, workers=workers, tokens=tokens)
    plan = Plan(str(model), vae, device, dtype, options, store, rows, ".safetensors" if single else parts)
    folder = out.with_name(f".{out.name}.parts") if single else out
    with naming_full_disk(out, "finished parts are kept"):
        _open(folder, plan, sources, single)
        ranges = [(start, min(start + rows, len(sources))) for start in range(0, len(sources), rows)]
        missing = [i for i in range(len(ranges)) if not _part(folder, i, plan).is_file()]
        resumed = len(sources) - sum(ranges[i][1] - ranges[i][0] for i in missing)
        counter = _Counter(resumed, len(sources), progress)
        if missing:
            if processes == 1 or len(missing) == 1:
                model_here = plan.load() if loaded is None else loaded
                for number in missing:
                    _encode_part(model_here, plan, sources, ranges[number], _part(folder, number, plan), counter.add)
            else:
                _in_processes(plan, sources, folder, ranges, missing, counter, processes)
        images, skipped = _finish(folder, plan, len(ranges), out if single else None)
    return Done(out, images, skipped, resumed, time.monotonic() - began)


def _check(sources: Sources, out: Path, single: bool, processes: int, rows: int | None, parts: str, store: str) -> None:
    for name, value in (("processes", processes), ("rows", rows)):
        if value is not None and value < 1:
            raise ValueError(f"encode: {name} must be at least 1, got {value}")
    if store not in ("float32", "float16"):
        raise ValueError(f"encode: store must be float32 or float16, got {store!r}")
    if parts not in SUFFIXES:
        raise ValueError(f"encode: parts must be one of {', '.join(SUFFIXES)}, got {parts!r}")
    if single:
        check_output(out)
    elif out.suffix and not out.is_dir():
        raise ValueError(f"encode: out must end in {', '.join(SUFFIXES)}, or be a folder, got {out}")
    else:
        check_writable_folder(out)
    if not len(sources):
        raise DataError("encode: there are no images")


# ---- the folder of parts ---------------------------------------------------------------------------------------------


def _part(folder: Path, number: int, plan: Plan) -> Path:
    return folder / f"{number:05d}{plan.suffix}"


def _open(folder: Path, plan: Plan, sources: Sources, single: bool) -> None:
    """Creates the folder, or reuses that of the same job. For a single file, leftovers of another job are deleted."""
    words = {**_described(plan), "weights": _weights(plan), "images": len(sources), "sources": sources.fingerprint()}
    path = folder / JOB
    if folder.is_dir() and any(folder.iterdir()):
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            former = None
        if former == words:
            return
        if not single:
            changed = "other files" if former is None else f"another job (its {', '.join(_changed(former, words))})"
            raise FileExistsError(f"encode: {folder} holds {changed}; name another folder, or delete it")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(words, indent=1), encoding="utf-8")


def _described(plan: Plan) -> dict[str, Any]:
    """The plan's settings that affect the output."""
    words = asdict(plan)
    options = words.pop("options")
    for name in ("batch_size", "workers", "progress"):  # these don't change the output
        del options[name]
    return {**words, **options}


def _changed(former: Any, words: dict[str, Any]) -> list[str]:
    return [name for name in words if not isinstance(former, dict) or former.get(name) != words[name]]


def _weights(plan: Plan) -> list[Any]:
    """Name, size and modification time of the model's files, if it is a folder."""
    folder = Path(plan.model).expanduser()
    if not folder.is_dir():
        return []
    folder = pretrained.model_folder(folder, "encode")
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.iterdir()) if file.is_file()]


def _finish(folder: Path, plan: Plan, count: int, out: Path | None) -> tuple[int, dict[str, str]]:
    """Joins the parts into `out`, or lists them in the folder's index; returns the number of images, and the skipped ones."""
    files = [_part(folder, i, plan) for i in range(count)]
    heads = [read_head(file) for file in files]
    images = sum(len(head.names) for head in heads)
    skipped = {name: reason for head in heads for name, reason in head.skipped.items()}
    if not images:
        shutil.rmtree(folder)
        raise DataError(f"encode: none of the {len(skipped)} images could be read ({_counts(skipped)})")
    if out is None:
        listed = [{"file": file.name, "images": len(head.names)} for file, head in zip(files, heads, strict=True)]
        with atomic_write(folder / INDEX) as temporary:
            temporary.write_text(json.dumps({"images": images, "parts": listed, **heads[0].about}, indent=1), encoding="utf-8")
        return images, skipped
    names = [name for head in heads for name in head.names]
    about, with_tokens = heads[0].about, plan.options.tokens
    with contextlib.ExitStack() as stack:
        pooled = stack.enter_context(MappedFile(folder / "pooled"))
        tokens = stack.enter_context(MappedFile(folder / "tokens")) if with_tokens else None
        for file in files:
            part = read_embeddings(file)
            pooled.append(part.pooled)
            if tokens is not None and part.tokens is not None:
                tokens.append(part.tokens)
        joined = None if tokens is None else tokens.tensor(images)
        write_embeddings(out, Embeddings(pooled.tensor(images), joined, names, skipped, about))
    shutil.rmtree(folder)
    return images, skipped


def _counts(skipped: dict[str, str]) -> str:
    reasons = list(skipped.values())
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))


# ---- work ------------------------------------------------------------------------------------------------------------


class _Counter:
    """Counts the finished images, and reports them to `progress`."""

    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = done, total, progress
        progress(done, total)

    def add(self, count: int) -> None:
        self.done += count
        self.progress(self.done, self.total)


def _encode_part(
    model: OpenVision3 | VisionTower,
    plan: Plan,
    sources: Sources,
    span: tuple[int, int],
    file: Path,
    done: Callable[[int], None],
) -> None:
    job = Job(model, sources.items(*span), plan.options, Memory(), Memory() if plan.options.tokens else None, on_batch=done)
    with warnings.catch_warnings(), contextlib.suppress(DataError):  # a part may have no readable image
        warnings.simplefilter("ignore", SkipWarning)  # they are listed in the part, and in the summary
        job.run()
    done(len(job.skipped))
    if not job.names:
        vision = model.encoder.config
        job.pooled.append(torch.empty(0, vision.embed_dim))
        if job.tokens is not None:
            job.tokens.append(torch.empty(0, (job.size // (VAE_STRIDE * vision.patch_size)) ** 2, vision.width))
    found, dtype = job.embeddings(), getattr(torch, plan.store)
    tokens = None if found.tokens is None else found.tokens.to(dtype)
    write_embeddings(file, replace(found, pooled=found.pooled.to(dtype), tokens=tokens))


def _in_processes(
    plan: Plan,
    sources: Sources,
    folder: Path,
    ranges: list[tuple[int, int]],
    missing: list[int],
    counter: _Counter,
    processes: int,
) -> None:
    context = multiprocessing.get_context("spawn")
    waiting, told = context.Queue(), context.SimpleQueue()
    for number in missing:
        waiting.put(number)
    count = min(processes, len(missing))
    for _ in range(count):
        waiting.put(None)
    threads = max(1, torch.get_num_threads() // count)
    arguments = (plan, sources, folder, ranges, waiting, told, threads)
    started = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    try:
        _watch(started, told, counter)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()
        waiting.cancel_join_thread()


def _watch(started: list[Any], told: Any, counter: _Counter) -> None:
    """Waits until all have ended. Raises a process's error, or RuntimeError if one was killed."""
    while True:
        alive = any(process.is_alive() for process in started)
        while not told.empty():
            found = told.get()
            if isinstance(found, int):
                counter.add(found)
            else:
                raise found
        if broken := next((process for process in started if process.exitcode not in (None, 0)), None):
            raise RuntimeError(
                f"encode: process {broken.pid} ended with code {broken.exitcode}; finished parts are kept, and the same command resumes"
            )
        if not alive:
            return
        time.sleep(0.05)


def _work(
    plan: Plan, sources: Sources, folder: Path, ranges: list[tuple[int, int]], waiting: Any, told: Any, threads: int
) -> None:
    """One process: encodes parts until none are left."""
    torch.set_num_threads(threads)
    _end_with_parent()
    try:
        model = plan.load()
        while (number := waiting.get()) is not None:
            _encode_part(model, plan, sources, ranges[number], _part(folder, number, plan), told.put)
    except Exception as error:  # unchanged if it can be pickled
        with contextlib.suppress(Exception):
            told.put(error if type(error).__module__ == "builtins" else RuntimeError(f"{type(error).__name__}: {error}"))
        sys.exit(1)


def _end_with_parent() -> None:
    """A killed parent can't end its children, so they watch it."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


@contextlib.contextmanager
def shown(show: bool) -> Iterator[Progress]:
    """A progress bar with the rate, unless `show` is false."""
    if not show:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("encode"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, transient=True) as bar:
        task, first, began = bar.add_task("encode", total=None, rate=""), None, time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal first
            first = done if first is None else first
            rate = (done - first) / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} images/s")

        yield progress
