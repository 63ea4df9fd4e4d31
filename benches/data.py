"""Parts of the pretraining table about data: decoding and cropping, the contrastive exchange, resuming, and the start on many shards."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource as process_resources
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import timing
from .figures import Figure

# ---- decode ----------------------------------------------------------------------------------------------------------

SIZES = (((512, 384), 128), ((512, 384), 256), ((1024, 768), 128), ((1024, 768), 256), ((2048, 1536), 256))
"""(width, height) of the files -> side of the crops. Recap-DataComp's are mostly 512 pixels or less a side."""


def decode(options: Any) -> list[Figure]:
    """images/s in processes, as the loader's workers: of the faster decoder alone, and with training's crops, with data.decode "full" and "fast"."""
    from ov3fast.data import hash_rng, jpeg, transforms
    from ov3fast.data.images import decode_image, decode_reduced

    def crop(item: tuple[int, bytes], size: int, fast: bool) -> None:
        number, content = item

        def box(width: int, height: int) -> list[float]:
            uniforms = hash_rng.uniform(0, hash_rng.CROP, number, 0, np.arange(40).reshape(1, 10, 4))
            return transforms.inception_boxes(np.array([[width, height]]), uniforms)[0].tolist()

        image: Any
        if fast:
            image = decode_reduced(content, lambda width, height: transforms.reduction(box(width, height), size))
        else:
            image = decode_image(content)
        transforms.crop_resize(image, box(*getattr(image, "full_size", image.size)), size, "bilinear", 1.5)

    rows = []
    for (width, height), size in SIZES:
        files = list(enumerate(photo(width, height, seed) for seed in range(max(8, 12 * 2**20 // (width * height)))))
        works: dict[str, Callable[[Any], None]] = {
            "decoder alone": lambda item: decode_image(item[1]) and None,
            "decode + crop, full": lambda item, size=size: crop(item, size, False),
            "decode + crop, fast": lambda item, size=size: crop(item, size, True),
        }
        with _Processes(options.threads, works, files) as processes:
            runs = {name: partial(processes.run, name) for name in works}
            seconds = timing.interleaved(runs, options.budget / len(SIZES), least=3)
        rates = {name: len(files) / statistics.median(values) for name, values in seconds.items()}
        alone = rates["decoder alone"]
        for name, rate in rates.items():
            held = name != "decoder alone"
            rows.append(
                Figure(
                    f"JPEG {width}x{height} to {size}, {options.threads} processes", name, rate, "images/s", alone if held else None,
                    rate / alone if held else None, ">= 0.90" if "fast" in name else "", "" if held else _decoder_name(jpeg),
                )
            )  # fmt: skip
    return rows


class _Processes:
    """Forked processes that go through the files by turns, each with all of one work's."""

    def __init__(self, count: int, works: dict[str, Callable[[Any], None]], files: list[Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes, self.members = [], []
        for number in range(count):
            ours, theirs = context.Pipe()
            member = context.Process(target=self._serve, args=(theirs, works, files[number::count]), daemon=True)
            member.start()
            self.pipes.append(ours)
            self.members.append(member)

    @staticmethod
    def _serve(pipe: Any, works: dict[str, Callable[[Any], None]], files: list[Any]) -> None:
        torch.set_num_threads(1)
        while name := pipe.recv():
            for file in files:
                works[name](file)
            pipe.send(True)

    def run(self, name: str) -> None:
        for pipe in self.pipes:
            pipe.send(name)
        for pipe in self.pipes:
            pipe.recv()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, member in zip(self.pipes, self.members, strict=True):
            pipe.send("")
            member.join()


def _decoder_name(jpeg: Any) -> str:
    return "Pillow" if jpeg.decoder() is None else "simplejpeg"


def photo(width: int, height: int, seed: int) -> bytes:
    """Something with the detail of a photo: about 0.25 bytes a pixel at quality 90."""
    from PIL import Image

    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = (smooth + random.integers(-6, 7, (height, width, 1), np.int16)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


# ---- exchange --------------------------------------------------------------------------------------------------------

PAIRS, WIDTH = 8192, 512


def exchange(options: Any) -> list[Figure]:
    """The contrastive loss and its gradients over two gloo ranks against one process, a thread each. Memory is what a process grows by, and its
    features."""
    rows: list[Figure] = []
    alone: tuple[float, float] | None = None
    what = f"contrastive loss, N = {PAIRS}, D = {WIDTH}, fp32, forward + backward"
    for name, world in (("one process", 1), ("gather, 2 ranks", 2), ("ring, 2 ranks", 2)):
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=_exchange_rank, args=(rank, world, name.partition(",")[0], PAIRS, WIDTH, folder))
                for rank in range(world)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
        seconds, whole = max(t["seconds"] for t in told), max(t["features_mb"] + t["mb"] for t in told)
        alone = alone or (seconds, whole)
        ratios = [None, None] if world == 1 else [seconds / alone[0], whole / alone[1]]
        rows.append(
            Figure(
                what,
                f"{name}: time",
                seconds,
                "s",
                None if world == 1 else alone[0] / 2,
                ratios[0],
                "<= 0.65" if world > 1 else "",
            )
        )
        rows.append(
            Figure(
                what,
                f"{name}: memory of a rank",
                whole,
                "MB",
                None if world == 1 else alone[1] / 2,
                ratios[1],
                "<= 0.6" if "ring" in name else "",
            )
        )
    return rows


def _exchange_rank(rank: int, world: int, name: str, pairs: int, width: int, folder: str) -> None:
    import torch.distributed as dist

    from ov3fast import ops

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(rank)
    image, text = (torch.randn(pairs // world, width, requires_grad=True) for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    options: dict[str, Any] = {} if world == 1 else {"group": dist.group.WORLD, "exchange": name}

    def run() -> None:
        image.grad = text.grad = scale.grad = None
        ops.contrastive_loss(image, text, scale, **options).backward()

    small = [torch.randn(64, width, requires_grad=True) for _ in range(2)]
    ops.contrastive_loss(*small, scale, **options).backward()  # code and buffers that are there once
    dist.barrier()
    memory = timing.extra_memory(run)
    times = []
    for _ in range(3):
        dist.barrier()
        times.append(timing._seconds(run))
    features = 2 * image.numel() * 4 / 1e6
    Path(folder, f"{rank}.json").write_text(
        json.dumps({"seconds": statistics.median(times), "mb": memory, "features_mb": features, "peak": process_resources.getrusage(process_resources.RUSAGE_SELF).ru_maxrss})
    )  # fmt: skip
    dist.destroy_process_group()


# ---- resuming and starting -------------------------------------------------------------------------------------------


def resume(options: Any) -> list[Figure]:
    """Bytes that a fresh loader reads for the first batch after a resume, from tars behind URLs in fsspec's memory file system."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    from ov3fast.data import DataConfig, Loader, SourceConfig, index_shards
    from ov3fast.data.shards import write_shards

    read: list[int] = []

    class Counting(MemoryFileSystem):
        protocol = "counting"
        store: dict[str, Any] = {}
        pseudo_dirs = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://"))

        def cat_file(self, path: str, start: Any = None, end: Any = None, **rest: Any) -> bytes:
            content = super().cat_file(path, start, end, **rest)
            read.append(len(content))
            return content

    fsspec.register_implementation("counting", Counting, clobber=True)
    with tempfile.TemporaryDirectory() as folder:
        picture = photo(512, 384, 0)
        write_shards([(f"{i:05d}", {"jpg": picture, "txt": b"text"}) for i in range(2000)], folder, samples_per_shard=50)
        store = fsspec.filesystem("counting")
        for tar in Path(folder).glob("*.tar"):
            store.pipe_file(f"/shards/{tar.name}", tar.read_bytes())
    index_shards("counting://shards", workers=1)
    config = DataConfig(sources=(SourceConfig("counting://shards", captions=(("txt", 1.0),)),), shard_window=8)
    rows: list[Figure] = []
    for step in (10, 10**6):
        read.clear()
        began = time.perf_counter()
        Loader(config, image_size=64, batch_size=64).batch(step)
        seconds = time.perf_counter() - began
        ratio = sum(read) / 1e6 / rows[0].value if rows else None
        rows.append(
            Figure(
                "resume: read until the first batch of 64 is there", f"at step {step:,}", sum(read) / 1e6, "MB", 64 * len(picture) / 1e6, ratio,
                "the same bytes" if rows else "", f"{seconds:.2f} s; floor: the 64 pictures",
            )
        )  # fmt: skip
    return rows


def start(options: Any) -> list[Figure]:
    """10^5 names of a few tars of 12 samples: until the first batch can be made, and batches at the beginning, middle and end of an epoch."""
    from ov3fast.data import DataConfig, Loader, SourceConfig, index_shards
    from ov3fast.data.shards import INDEX, write_shards

    count, per = 100_000, 12
    with tempfile.TemporaryDirectory() as folder:
        source, many = Path(folder) / "one", Path(folder) / "many"
        write_shards([(f"{i:03d}", {"jpg": photo(64, 48, i), "txt": b"text"}) for i in range(per)], source)
        index_shards(source, workers=1)
        many.mkdir()
        size = (source / "00000.tar").stat().st_size
        links: list[Path] = []
        for number in range(count):
            if number % 30_000 == 0:  # a file takes so many links at most
                links = [Path(folder) / f"copy-{number}{suffix}" for suffix in (".tar", ".index")]
                for link in links:
                    link.write_bytes((source / f"00000{link.suffix}").read_bytes())
            for link in links:
                os.link(link, many / f"{number:06d}{link.suffix}")
        entries = [{"url": f"{number:06d}.tar", "nsamples": per, "filesize": size} for number in range(count)]
        (many / INDEX).write_text(json.dumps({"shardlist": entries}))
        config = DataConfig(sources=(SourceConfig(str(many), captions=(("txt", 1.0),)),), shard_window=64)
        began = time.perf_counter()
        loader = Loader(config, image_size=64, batch_size=64)
        seconds = time.perf_counter() - began
        rows = [
            Figure(
                "start on 100,000 indexed shards", "until the first batch can be made", seconds, "s", None, seconds, "< 10 s"
            )
        ]
        places = {"the first": 0, "the middle": count * per // 128, "the last": count * per // 64 - 2}
        for name, step in places.items():
            began = time.perf_counter()
            loader.batch(step)
            note = "orders the shards" if step == 0 else ""
            rows.append(Figure("batch of 64 on them", name, time.perf_counter() - began, "s", note=note))
    return rows
