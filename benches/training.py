"""Parts of the pretraining table that train: the base model's step, the step from the latent cache, what writes the cache, and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ov3fast import ops

from . import plain, timing
from .figures import Figure

CPU = torch.device("cpu")


class Setting:
    """The base recipe's model, optimizer and step at a size, and the VAE: FLUX's architecture with random weights, or the package's small one."""

    def __init__(self, pixels: int, batch: int, precision: str, flux: bool, **changes: Any) -> None:
        from ov3fast.models.flops import flops_per_image
        from ov3fast.models.openvision3 import OpenVision3
        from ov3fast.models.tokenizer import get_tokenizer
        from ov3fast.models.vae import FLUX_VAE, SMALL, FrozenVAE
        from ov3fast.recipes import get_recipe
        from ov3fast.training.optimizer import AdamW
        from ov3fast.training.timing import Timer

        base = get_recipe("base")
        self.stage = dataclasses.replace(
            base.stages[0], image_size=pixels, batch_size=batch, epochs=None, steps=1000, warmup_epochs=None
        )
        self.recipe = dataclasses.replace(
            base,
            stages=(self.stage,),
            precision=precision,
            model=base.model if flux else dataclasses.replace(base.model, vae=SMALL),
            vae_batch=1,
            activation_checkpointing=False,
            compile=False,
            **changes,
        )
        torch.manual_seed(0)
        self.model = OpenVision3(self.recipe.model, tokenizer=get_tokenizer("wordpiece"))
        vae = FrozenVAE.from_config(FLUX_VAE) if flux else FrozenVAE.from_pretrained(SMALL)
        self.vae = vae.to(memory_format=torch.channels_last)
        self.model.set_vae(self.vae)
        self.model.train()
        self.optimizer = AdamW(self.model, self.recipe.optimizer)
        self.optimizer.set_lr(1e-5)
        self.timer = Timer(CPU)
        self.flops = flops_per_image(self.recipe.model, pixels)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def micro_batch(self, recipe: Any) -> Any:
        """Made up, latents included."""
        from ov3fast.training.footprint import blank_micro_batch

        made = blank_micro_batch(
            dataclasses.replace(recipe, cache_latents=True, data=_cacheable(recipe)),
            self.stage,
            self.stage.batch_size,
            self.vae,
        )
        for ids in (made.text_ids, made.caption_ids):
            ids.random_(5, recipe.model.text.vocab_size)
        made.latents.normal_()
        for rows in (made.caption_rows, made.pixel_rows):
            if rows is not None:
                rows.copy_(torch.arange(len(rows)))
        return made

    def step_of(self, recipe: Any) -> Any:
        from ov3fast.losses import Objective
        from ov3fast.training.distributed import ALONE
        from ov3fast.training.parallel import Parallel
        from ov3fast.training.step import Step

        objective = Objective(recipe.stage_objective(recipe.stages[0]))
        parallel = Parallel(self.model, recipe, ALONE)
        return Step(parallel, objective, self.timer, bf16=recipe.precision == "bf16", exact_contrastive=True)

    def floor(self, encoded: bool, decoded: bool) -> float:
        """Seconds: the towers' products at the rate of the best product in their precision, the VAE's in its own, and the optimizer's bytes at a
        copy's rate."""
        rates, copy = floors()
        flops, images = self.flops, self.stage.batch_size
        towers = 3 * sum(flops[name] for name in ("encoder", "decoder", "text", "captioner"))
        vae = (flops["vae_encoder"] if encoded else 0.0) + (2 * flops["vae_decoder"] if decoded else 0.0)
        memory = 7 * 4 * self.parameters / copy  # reads weight, gradient and moments, writes all but the gradient
        return images * (towers / rates[self.recipe.precision] + vae / rates["fp32"]) + memory


@functools.cache
def floors() -> tuple[dict[str, float], float]:
    """(FLOP/s of the best matrix product in bf16 and fp32, bytes/s of a copy)."""
    rates = {name: timing.gemm_rate(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    return rates, timing.copy_rate()


# ---- the step ---------------------------------------------------------------------------------------------------------


def step(pixels: int, batch: int, precision: str, options: Any) -> list[Figure]:
    """A whole optimizer step of the base model with the VAE's encoder and decoder in it: ours, PyTorch's own functions, and torch.compile of them."""
    flux = pixels > 128
    setting = Setting(pixels, batch, precision, flux)
    made, images = setting.micro_batch(setting.recipe), torch.rand(batch, 3, pixels, pixels) * 2 - 1
    run = setting.step_of(setting.recipe)

    def update(images: torch.Tensor = images, made: Any = made) -> None:
        latents = setting.vae.encode(images, "mean", setting.recipe.model.latent_convention).float()
        shown = None if made.images is None else images
        setting.optimizer.zero_grad()
        run([dataclasses.replace(made, latents=latents, images=shown)])
        run.update(setting.optimizer)

    kept: dict[str, Any] = {}
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "ov3fast": nullcontext,
        "eager": lambda: ops.use("eager"),
        "compile": lambda: plain.compiled(setting.model, setting.vae.vae, kept),
    }
    names = options.variants or tuple(contexts)
    medians = interleaved({name: _within(contexts[name], update) for name in names}, options.budget)
    what = f"base step, {pixels} px, batch {batch}, {'FLUX-size' if flux else 'small'} VAE, {precision}"
    floor, asked = setting.floor(True, True), ">= 1.2 x" if flux else ">= 1.3 x"
    peers = [medians[name] for name in names if name != "ov3fast"]
    rows = []
    for name in names:
        ours = name == "ov3fast" and peers
        ratio = min(peers) / medians[name] if ours else None
        rows.append(Figure(what, name, medians[name], "s", floor if name == "ov3fast" else None, ratio, asked if ours else ""))
    return rows


def _within(context: Callable[[], AbstractContextManager[Any]], function: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with context():
            function()

    return run


def interleaved(variants: dict[str, Callable[[], None]], budget: float, least: int = 1) -> dict[str, float]:
    """Medians; the first run of each is not counted. Long ones get `least` turns."""
    from ov3fast.ops import _trials

    _trials.settle()
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    began = time.perf_counter()
    while len(next(iter(seconds.values()))) < least or time.perf_counter() - began < budget:
        for name, run in variants.items():
            seconds[name].append(timing._seconds(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---- the latent cache -------------------------------------------------------------------------------------------------


class Shards:
    """A few photos as shards, and their latents."""

    def __init__(self, folder: Path, setting: Setting, samples: int) -> None:
        from ov3fast.data.config import DataConfig, SourceConfig
        from ov3fast.data.shards import write_shards
        from ov3fast.training import build

        from .data import photo

        write_shards(
            [(f"{i:03d}", {"jpg": photo(512, 384, i), "txt": b"a picture of something"}) for i in range(samples)],
            folder / "shards",
        )
        source = SourceConfig(str(folder / "shards"), captions=(("txt", 1.0),), caption_key="txt")
        self.data = DataConfig(sources=(source,), interpolation="bilinear", variants=1)
        self.latents, self.samples = folder / "latents", samples
        self.facts = build.vae_facts(setting.vae, setting.stage.image_size, setting.recipe.model.latent_convention, 1)

    def write(self, encode: Callable[[torch.Tensor], torch.Tensor], pixels: int) -> float:
        """Seconds."""
        from ov3fast.data.latent_shards import write_latents

        began = time.perf_counter()
        write_latents(self.data, self.latents, pixels, encode, self.facts, workers=1)
        return time.perf_counter() - began


def cached(options: Any) -> list[Figure]:
    """A step of the base model at 256 px, batch 2: with latents from the cache, and with the VAE."""
    from ov3fast.data.store import SampleStore
    from ov3fast.training.distributed import ALONE
    from ov3fast.training.inputs import Inputs

    setting = Setting(256, 2, "bf16", flux=True)
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder), setting, 2)
        zeros = torch.zeros(1, *shards.facts["shape"])
        shards.write(lambda images: zeros, 256)  # the values don't matter here

        def run(pixels: bool, from_cache: bool) -> Iterator[dict[str, float]]:
            stage = setting.stage if pixels else dataclasses.replace(setting.stage, pixel_images=0)
            data = dataclasses.replace(shards.data, latents=str(shards.latents)) if from_cache else shards.data
            recipe = dataclasses.replace(setting.recipe, stages=(stage,), data=data, run_dir=Path(folder) / "run")
            inputs = Inputs(
                recipe, 0, recipe.stage_objective(stage), setting.model, SampleStore(data), ALONE, setting.timer, None
            )
            inputs.prepare(lambda done, total: None)
            inputs.start(0, 1000)
            step = setting.step_of(recipe)
            for number in range(1000):
                setting.timer.reset()
                began = time.perf_counter()
                with setting.timer("rest"):
                    setting.optimizer.zero_grad()
                    micro_batches, _ = inputs.next(number)
                    step(micro_batches)
                    with setting.timer("optimizer"):
                        step.update(setting.optimizer)
                yield {"step": time.perf_counter() - began, **setting.timer.table()}

        variants = {
            "latents from the cache": run(False, True),
            "latents encoded": run(False, False),
            "images encoded and decoded": run(True, False),
        }
        next(variants["latents from the cache"])  # code and buffers that are there once
        times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for turn in range(2):
            for name, steps in variants.items():
                if turn == 0 or "decoded" not in name:
                    times[name].append(next(steps))
    medians = {name: min(values, key=lambda value: value["step"]) for name, values in times.items()}
    ours = medians["latents from the cache"]["step"]
    rows = []
    for name, parts in medians.items():
        floor = setting.floor("encoded" in name, "decoded" in name)
        note = ", ".join(f"{part} {value:.2f}" for part, value in parts.items() if part != "step" and value >= 0.05)
        ratio = None if name.endswith("cache") else parts["step"] / ours
        asked = ">= 5 x" if "decoded" in name else ""
        rows.append(Figure("base step, 256 px, batch 2, FLUX-size VAE", name, parts["step"], "s", floor, ratio, asked, note))
    return rows


def written(options: Any) -> list[Figure]:
    """The cache written, against the VAE on pixels that are there."""
    setting = Setting(256, 1, "bf16", flux=True)
    pixels = torch.rand(1, 3, 256, 256) * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder), setting, 8)
        setting.vae.moments(pixels)
        alone = [timing._seconds(lambda: setting.vae.moments(pixels)) for _ in range(4)]
        seconds = shards.write(setting.vae.moments, 256)
        alone += [timing._seconds(lambda: setting.vae.moments(pixels)) for _ in range(4)]
    rate, most = shards.samples / seconds, 1 / statistics.median(alone)
    what = "latent cache, 256 px, FLUX-size VAE, fp32"
    return [
        Figure(what, "VAE alone", most, "images/s"),
        Figure(what, "written", rate, "images/s", most, rate / most, ">= 0.95"),
    ]


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(options: Any) -> list[Figure]:
    """What saving weights and moments of the base model holds up its steps: the call and the wait before the next update."""
    from ov3fast.training.saving import Saver

    setting = Setting(128, 4, "bf16", flux=False)
    recipe = dataclasses.replace(setting.recipe, objective=dataclasses.replace(setting.recipe.objective, pixel_weight=0.0))
    made, run = setting.micro_batch(recipe), setting.step_of(recipe)
    tensors = {"model": setting.model.state_dict(), "optimizer": setting.optimizer.moments()}
    size = sum(value.numel() * value.element_size() for group in tensors.values() for value in group.values())
    held, plain_steps, saving_steps, there = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(folder, keep=1)

        def step(number: int | None) -> tuple[float, float]:
            """(seconds of the step, seconds that it waited for a save)."""
            began = time.perf_counter()
            if number is not None:
                saver.save(number, tensors, {})
            called = time.perf_counter()
            setting.optimizer.zero_grad()
            run([made])
            passes = time.perf_counter()
            saver.copied()
            copied = time.perf_counter()
            run.update(setting.optimizer)
            return time.perf_counter() - began, (called - began if number is not None else 0.0) + copied - passes

        step(None)
        for turn in range(2):
            plain_steps.append(step(None)[0])
            seconds, wait = step(turn)
            saving_steps.append(seconds)
            held.append(wait)
            began = time.perf_counter()
            saver.finish()
            there.append(time.perf_counter() - began + seconds)
        saver.close()
    what = f"checkpoint of {setting.parameters / 1e6:.0f} M parameters ({size / 1e9:.1f} GB)"
    copy = size / timing.copy_rate() * 2
    longer = statistics.median(saving_steps) - statistics.median(plain_steps)
    wait = statistics.median(held)
    return [
        Figure(what, "step held", wait, "s", None, wait, "< 0.5 s", f"a copy alone takes {copy:.2f} s"),
        Figure(what, "step longer, its passes slowed by the copying included", longer, "s", None, None, "", f"of {statistics.median(plain_steps):.2f} s"),
        Figure(what, "until it is there", statistics.median(there), "s", None, None, "", f"{size / 1e9 / statistics.median(there):.2f} GB/s written and hashed"),
    ]  # fmt: skip


def _cacheable(recipe: Any) -> Any:
    """Its data as a recipe with cache_latents has to have it."""
    return dataclasses.replace(recipe.data, variants=1, cache_images=True, decode="full")
