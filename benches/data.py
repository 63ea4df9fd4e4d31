"""Benchmarks of the data path: decoding and cropping, the latent cache, the contrastive exchange, and startup with many shards.

    python -m benches.data decode | latents | exchange | start          # writes benches/results/data-PART-CHIP.csv

decode: images/s of the decoder alone and with crops, in threads. latents: a training step from the cache against one that encodes, and the speed of
writing the cache. exchange: peak memory and time of two gloo ranks against one process. start: seconds until 10^5 indexed shards can be
read. Variants are interleaved and medians reported. Use a quiet machine.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from . import timing

RESULTS = Path(__file__).parent / "results"


@dataclass
class Options:
    part: tyro.conf.Positional[Literal["decode", "latents", "exchange", "start"]]
    threads: int = 2
    budget: float = 20.0
    """Seconds of timing per comparison."""
    pairs: int = 8192
    """exchange: number of pairs over all ranks."""
    width: int = 512
    """exchange: width of the features."""
    save: bool = True


Rows = list[dict[str, Any]]


# ---- decode ----------------------------------------------------------------------------------------------------------


def decode(options: Options) -> Rows:
    from PIL import Image

    from ov3fast.data import jpeg
    from ov3fast.data.images import decode_image
    from ov3fast.data.transforms import crop_resize

    rows = []
    for (width, height), size in (
        ((512, 384), 128),
        ((512, 384), 256),
        ((1024, 768), 128),
        ((1024, 768), 256),
        ((2048, 1536), 256),
    ):
        files = [_photo(width, height, seed) for seed in range(max(4, 6 * 2**20 // (width * height)))]
        box = (0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height)

        def alone(content: bytes) -> None:
            decode_image(content)

        def cropped(content: bytes, box: Any = box, size: int = size) -> None:
            crop_resize(decode_image(content), box, size, "bilinear", 1.5)

        with ThreadPoolExecutor(options.threads) as pool:
            variants = {}
            for name, decoder in (("pillow", lambda: None), ("simplejpeg", jpeg.decoder)):
                if decoder() is None and name != "pillow":
                    continue
                for kind, work in (("decode", alone), ("decode + crop", cropped)):
                    variants[f"{name} {kind}"] = _with_decoder(decoder, pool, work, files)
            seconds = timing.interleaved(variants, options.budget / 5, least=3)
        rates = {name: len(files) / statistics.median(values) for name, values in seconds.items()}
        best = max((name for name in rates if name.endswith("decode")), key=lambda name: rates[name])
        for name, rate in rates.items():
            rows.append({"case": f"{width}x{height} to {size}", "variant": name, "images_per_s": f"{rate:.0f}",
                         "of_best_decoder_alone": f"{rate / rates[best]:.2f}", "pillow": Image.__version__})  # fmt: skip
    return rows


def _with_decoder(
    decoder: Callable[[], Any], pool: ThreadPoolExecutor, work: Callable[[bytes], None], files: list[bytes]
) -> Callable[[], None]:
    from ov3fast.data import jpeg

    def run() -> None:
        real, jpeg.decoder = jpeg.decoder, decoder
        try:
            for _ in pool.map(work, files):
                pass
        finally:
            jpeg.decoder = real

    return run


def _photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG with about the detail of a photo: 0.25 bytes per pixel at quality 90."""
    from PIL import Image

    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = (smooth + random.integers(-6, 7, (height, width, 1), np.int16)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


# ---- latents ---------------------------------------------------------------------------------------------------------


def latents(options: Options) -> Rows:
    """The base recipe at 256 px, batch 2, with a FLUX-size VAE with random weights."""
    from ov3fast.data.config import DataConfig, SourceConfig
    from ov3fast.data.latent_shards import write_latents
    from ov3fast.data.shards import write_shards
    from ov3fast.data.store import SampleStore
    from ov3fast.losses import Objective
    from ov3fast.models.openvision3 import OpenVision3
    from ov3fast.models.tokenizer import get_tokenizer
    from ov3fast.models.vae import FLUX_VAE, FrozenVAE
    from ov3fast.recipes import get_recipe
    from ov3fast.training import build
    from ov3fast.training.distributed import Ranks
    from ov3fast.training.inputs import Inputs
    from ov3fast.training.optimizer import AdamW
    from ov3fast.training.parallel import Parallel
    from ov3fast.training.step import Step
    from ov3fast.training.timing import Timer

    with tempfile.TemporaryDirectory() as folder:
        samples = [(f"{i:03d}", {"jpg": _photo(512, 384, i), "txt": b"a picture of something"}) for i in range(4)]
        write_shards(samples, Path(folder) / "shards")
        base, batch = get_recipe("base"), 2
        data = DataConfig(
            sources=(SourceConfig(str(Path(folder) / "shards"), captions=(("txt", 1.0),), caption_key="txt"),), interpolation="bilinear", variants=1
        )  # fmt: skip
        stage = dataclasses.replace(
            base.stages[1], batch_size=batch, epochs=None, steps=100, warmup_epochs=None, lpips_weight=0.0, pixel_images=batch
        )
        recipe = dataclasses.replace(
            base,
            data=data,
            stages=(stage,),
            vae_batch=1,
            activation_checkpointing=False,
            compile=False,
            run_dir=Path(folder) / "run",
        )
        torch.manual_seed(0)
        vae = FrozenVAE.from_config(FLUX_VAE).to(memory_format=torch.channels_last)
        model = OpenVision3(recipe.model, tokenizer=get_tokenizer("wordpiece"))
        model.set_vae(vae)
        model.train()
        optimizer = AdamW(model, recipe.optimizer)
        optimizer.set_lr(1e-5)
        pixels = torch.rand(1, 3, 256, 256) * 2 - 1
        alone = [timing._seconds(lambda: vae.moments(pixels)) for _ in range(3)][1:]
        facts = build.vae_facts(vae, 256, recipe.model.latent_convention, 1)
        began = time.perf_counter()
        write_latents(data, Path(folder) / "latents", 256, vae.moments, facts, workers=1)
        written = len(samples) / (time.perf_counter() - began)
        after = [timing._seconds(lambda: vae.moments(pixels)) for _ in range(2)]
        vae_rate = 1 / statistics.median(alone + after)

        ranks, timer = Ranks(0, 1, torch.device("cpu")), Timer(torch.device("cpu"))

        def step(pixel: bool, cached: bool) -> Callable[[], None]:
            own_stage = stage if pixel else dataclasses.replace(stage, pixel_images=0)
            own = dataclasses.replace(recipe, stages=(own_stage,))
            if cached:
                own = dataclasses.replace(own, data=dataclasses.replace(data, latents=str(Path(folder) / "latents")))
            objective = own.stage_objective(own_stage)
            inputs = Inputs(own, 0, objective, model, SampleStore(own.data), ranks, timer, None)
            inputs.prepare(lambda done, total: None)
            inputs.start(0, 100)
            run = Step(Parallel(model, own, ranks), Objective(objective), timer, bf16=True, exact_contrastive=True)
            number = iter(range(100))

            def whole() -> None:
                optimizer.zero_grad()
                micro_batches, _ = inputs.next(next(number))
                run(micro_batches)
                run.update(optimizer)

            return whole

        variants = {
            "cached, latents alone": step(False, True),
            "online, latents alone": step(False, False),
            "online, with pixel L1": step(True, False),
        }
        seconds = {name: [] for name in variants}
        for turn in range(2):
            for name, run in variants.items():
                if turn or "pixel" not in name:
                    seconds[name].append(timing._seconds(run))
        medians = {name: values[-1] for name, values in seconds.items()}
    cached = medians["cached, latents alone"]
    rows: Rows = [
        {
            "case": "step, base at 256 px, batch 2, FLUX-size VAE",
            "variant": name,
            "seconds": f"{value:.3f}",
            "ratio": f"{value / cached:.2f}",
        }
        for name, value in medians.items()
    ]
    rows.append({"case": "VAE encode alone, images/s", "variant": "vae", "seconds": f"{1 / vae_rate:.3f}", "ratio": "1.00"})
    rows.append(
        {
            "case": "cache written",
            "variant": "of the VAE's rate",
            "seconds": f"{1 / written:.3f}",
            "ratio": f"{written / vae_rate:.3f}",
        }
    )
    return rows


# ---- exchange --------------------------------------------------------------------------------------------------------


def exchange(options: Options) -> Rows:
    """One thread per process. Memory is the growth of a process beyond the size of its features."""
    rows, alone = [], None
    for name, world in (("one process", 1), ("gather", 2), ("ring", 2)):
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=_exchange_rank, args=(rank, world, name, options.pairs, options.width, folder)) for rank in range(world)
            ]  # fmt: skip
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
        seconds, memory = max(t["seconds"] for t in told), max(t["mb"] for t in told)
        whole = max(t["features_mb"] + t["mb"] for t in told)
        alone = alone or (seconds, memory, whole)
        rows.append({
            "case": f"softmax, N = {options.pairs}, D = {options.width}, fp32, forward + backward", "variant": name, "ranks": world,
            "seconds": f"{seconds:.3f}", "time_ratio": f"{seconds / alone[0]:.2f}", "extra_mb_per_rank": f"{memory:.1f}",
            "extra_ratio": f"{memory / alone[1]:.2f}", "with_features_mb": f"{whole:.1f}", "memory_ratio": f"{whole / alone[2]:.2f}",
        })  # fmt: skip
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
    ops.contrastive_loss(*small, scale, **options).backward()  # loads code and allocates buffers once
    dist.barrier()
    memory = timing.extra_memory(run)
    times = []
    for _ in range(3):
        dist.barrier()
        times.append(timing._seconds(run))
    features = 2 * image.numel() * 4 / 1e6
    Path(folder, f"{rank}.json").write_text(
        json.dumps({"seconds": statistics.median(times), "mb": memory, "features_mb": features, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    )  # fmt: skip
    dist.destroy_process_group()


# ---- start -----------------------------------------------------------------------------------------------------------


def start(options: Options) -> Rows:
    """10^5 links to a few tars of 12 samples each; then a batch from the last step of the epoch, and one from a middle step."""
    from ov3fast.data import DataConfig, Loader, SourceConfig, index_shards
    from ov3fast.data.shards import INDEX, write_shards

    count, per = 100_000, 12
    with tempfile.TemporaryDirectory() as folder:
        source, many = Path(folder) / "one", Path(folder) / "many"
        write_shards([(f"{i:03d}", {"jpg": _photo(64, 48, i), "txt": b"text"}) for i in range(per)], source)
        began = time.perf_counter()
        index_shards(source, workers=1)
        indexed = time.perf_counter() - began
        many.mkdir()
        size = (source / "00000.tar").stat().st_size
        links: list[Path] = []
        for number in range(count):
            if number % 30_000 == 0:  # file systems limit the number of links to a file
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
        batches = []
        for step in (10, count * per // 128, count * per // 64 - 2):
            began = time.perf_counter()
            loader.batch(step)
            batches.append(time.perf_counter() - began)
    rows = [{"case": f"{count} indexed shards", "variant": "until the first batch can be made", "seconds": f"{seconds:.2f}"}]
    for name, value in zip(("step 10 (orders the shards)", "the middle step", "the last step"), batches, strict=True):
        rows.append({"case": f"{count} indexed shards, batch of 64", "variant": name, "seconds": f"{value:.3f}"})
    rows.append({"case": f"index of one tar of {per}", "variant": "written", "seconds": f"{indexed:.3f}"})
    return rows


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    rows = {"decode": decode, "latents": latents, "exchange": exchange, "start": start}[options.part](options)
    machine = timing.machine()
    rows = [{**row, **{key: machine[key] for key in ("cpu", "threads", "torch", "commit")}} for row in rows]
    for row in rows:
        print("  ".join(f"{value}" for key, value in row.items() if key not in machine), flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"data-{options.part}-{machine['chip']}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
