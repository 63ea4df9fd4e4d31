"""Whole runs of the tiny recipe and single steps in float64, in each process that rank_server.py forks.

jobs: [{"name": ..., "do": "train" | "gradients" | one of FAULTS, "fields": {...}, "fields_of_rank": {"1": {...}}}, ...]
"""

import dataclasses
import functools
import importlib.util
import os
import time
import warnings
from pathlib import Path

import torch

from ov3fast.data.skips import DataError
from ov3fast.data.store import SampleStore
from ov3fast.losses import Objective, ObjectiveConfig
from ov3fast.training import build, distributed, train
from ov3fast.training.inputs import Inputs
from ov3fast.training.parallel import Parallel, whole
from ov3fast.training.step import Step
from ov3fast.training.timing import Timer


def load_tiny():
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny_models" / "training_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_of(tiny, folder, run_dir, micro_batches, world, **fields):
    """36 images per step in `micro_batches` micro-batches over all processes: the same run for any number of processes."""
    recipe = tiny.recipe(
        folder,
        run_dir,
        accumulate=micro_batches // world,
        **{"stages": ((3, 32), (2, 48)), "gradient_norms_every": 3, **fields},
    )
    return tiny.with_stages(recipe, batch_size=36, pixel_images=12, caption_images=12)


def gradients(recipe, ranks) -> dict[str, torch.Tensor]:
    """Gradients of the first step's contrastive loss, in float64: full tensors on every rank."""
    store, timer = SampleStore(recipe.data), Timer(ranks.device)
    model = build.build_model(recipe, build.build_tokenizer(recipe, store), ranks.device)
    objective = Objective(recipe.stage_objective(recipe.stages[0]), None, recipe.contrastive_exchange)
    inputs = Inputs(recipe, 0, objective.config, model, store, ranks, timer, None)
    inputs.start(0, 1)
    micro_batches, _ = inputs.next(0)
    model.set_vae(None)
    model.double()
    for part in micro_batches:
        part.latents = part.latents.double()
    parallel = Parallel(model, recipe, ranks)
    losses, _ = Step(parallel, objective, timer, bf16=False, exact_contrastive=True)(micro_batches)
    loss = ranks.total(losses["contrastive"].clone()) / ranks.world
    found = {
        name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None and bool(whole(p.grad).any())
    }
    return {"loss": loss, **found}


def contrastive_alone(tiny, folder, run_dir, micro_batches, world, **fields):
    recipe = recipe_of(tiny, folder, run_dir, micro_batches, world, cache_latents=False, **fields)
    return tiny.with_stages(recipe, pixel_images=0)


COMPILE = torch.compile
CONTRASTIVE = ObjectiveConfig(rec_weight=0.0, caption_weight=0.0)


# ---- what can go wrong in rank 1's second step -----------------------------------------------------------------------


def one_image_less(micro_batches):
    part = micro_batches[-1]
    keep = len(part.keys) - 1
    return [*micro_batches[:-1], dataclasses.replace(part, keys=part.keys[:keep], latents=part.latents[:keep])]


def no_captions(micro_batches):
    return [dataclasses.replace(part, caption_ids=None, caption_rows=None) for part in micro_batches]


def one_micro_batch_less(micro_batches):
    return micro_batches[:-1]


def no_data(micro_batches):
    raise DataError("100 samples in a row can't be used")


def hang(micro_batches):
    time.sleep(15)
    return micro_batches


FAULTS = {function.__name__: function for function in (one_image_less, no_captions, one_micro_batch_less, no_data, hang)}


def spoil(fault) -> None:
    following = Inputs.next

    def spoiled(self, step):
        micro_batches, planned = following(self, step)
        return (fault(micro_batches) if step == 1 else micro_batches), planned

    Inputs.next = spoiled


def main(folder: Path, out: Path, jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    tiny, rank = load_tiny(), os.environ["RANK"]
    for job in jobs:
        fields = {**job["fields"], **job.get("fields_of_rank", {}).get(rank, {})}
        where, resume = out / job["name"], fields.pop("resume", False)
        world = int(os.environ["WORLD_SIZE"])
        if job["do"] in FAULTS and rank == "1":
            spoil(FAULTS[job["do"]])
        if fields.get("compile"):
            torch.compile = functools.partial(COMPILE, backend="aot_eager")  # needs no C++ compiler and takes seconds
        if job["do"] != "gradients":
            train(recipe_of(tiny, folder, where, 12, world, **fields), resume=resume)
        else:
            ranks = distributed.start("cpu")
            recipe = contrastive_alone(tiny, folder, where, 12, ranks.world, objective=CONTRASTIVE, **fields)
            found = gradients(recipe, ranks)
            if ranks.first:
                torch.save(found, out / f"{job['name']}.pt")
