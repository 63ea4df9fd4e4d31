"""From a recipe to the things that a run needs: tokenizer, VAE and model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL
import torch

from ov3fast.data.captions import texts_under
from ov3fast.data.images import DECODE_VERSION
from ov3fast.data.skips import SampleError
from ov3fast.data.store import SampleStore
from ov3fast.models import pretrained
from ov3fast.models.openvision3 import PARTS, WEIGHTS_FILE, OpenVision3
from ov3fast.models.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG
from ov3fast.models.tokenizer import FILE as TOKENIZER_FILE
from ov3fast.models.tokenizer import Tokenizer, get_tokenizer, load_tokenizer
from ov3fast.models.vae import FrozenVAE
from ov3fast.recipes.config import Recipe, Stage
from ov3fast.recipes.plain import leaves
from ov3fast.training.distributed import Ranks
from ov3fast.training.latents import weights_hash
from ov3fast.training.progress import TOKENIZER


def build_tokenizer(recipe: Recipe, store: SampleStore) -> Tokenizer:
    """The recipe's tokenizer, with the vocabulary of the training captions alone where the recipe restricts it."""
    tokenizer = get_tokenizer(recipe.model.tokenizer, recipe.vocab_file)
    return tokenizer.restrict(training_texts(store)) if recipe.restrict_vocabulary else tokenizer


def starting_tokenizer(recipe: Recipe, store: SampleStore, initial: Path | None, *, resumed: bool) -> Tokenizer:
    """The run's own where it is resumed, else that of the model folder `initial` where it has one, else the recipe's."""
    if resumed:
        return load_tokenizer(recipe.run_dir / TOKENIZER)
    if initial is not None and (initial / TOKENIZER_CONFIG).is_file():
        return load_tokenizer(initial)
    return build_tokenizer(recipe, store)


def training_texts(store: SampleStore) -> Iterator[str]:
    """Every caption of the paired sources under the keys that they use; unreadable samples are left to the loader."""
    for source in store.sources:
        if not source.config.paired:
            continue
        keys = {key for key, p in source.config.captions if p > 0} | {source.config.caption_key}
        for number in range(len(source.dataset)):
            try:
                sample = store.sample(source.offset + number, decode=False)[1]
            except SampleError:
                continue
            yield from (text for key in sorted(keys) for text in texts_under(sample.captions, key))


def build_model(recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> OpenVision3:
    """The model in training mode, initialised from recipe.seed, with its VAE attached."""
    config = recipe.model
    if recipe.restrict_vocabulary:
        config = config.for_tokenizer(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = OpenVision3(config, tokenizer=tokenizer)
    model.set_vae(build_vae(config.vae, config.vae_subfolder, recipe.vae_dtype))
    model.to(device).train()
    model.set_activation_checkpointing(recipe.activation_checkpointing, recipe.recompute)
    if recipe.compile:
        compile_blocks(model)
    return model


def compile_blocks(model: OpenVision3) -> None:
    """torch.compile of each block's forward. What is around the blocks is single operators; FSDP gathers a block's weights before the
    compiled call, and the tokens stay a tensor of the outer graph, at which each branch's gradient can be measured."""
    # Those are several backward passes, so the compiled one may not take over its buffers.
    torch._functorch.config.donated_buffer = False
    # The blocks of all towers are one piece of code: each tower, and its first block, which has no branch to add, is compiled once.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(PARTS))
    for name in PARTS:
        for block in getattr(model, name).transformer.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)


def initial_model(init_from: str | Path) -> Path:
    """The model folder that a path, a run or a hub id stands for."""
    what = f"init_from {init_from}"
    found = pretrained.resolve(init_from, what, ["config.json", WEIGHTS_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG])
    return pretrained.model_folder(found, what)


def load_initial(model: OpenVision3, folder: Path, init_from: str | Path) -> None:
    """Replaces the model's weights by those of a model folder, which errors call by what it was named as."""
    what = f"init_from {init_from}"
    pretrained.load_state(model, pretrained.read_tensors(folder / WEIGHTS_FILE, what), what)


def build_vae(path: str, subfolder: str | None, dtype: str) -> FrozenVAE:
    """The frozen VAE as training computes with it. dtype: "fp32" or "bf16"."""
    vae = FrozenVAE.from_pretrained(path, subfolder, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    # Convolutions are about twice as fast with the channels last, on CPUs in float32 as on GPUs in bfloat16.
    return vae.to(memory_format=torch.channels_last)


def vae_facts(vae: FrozenVAE, image_size: int, convention: str, batch: int | None) -> dict[str, Any]:
    """What a cache of the VAE's moments depends on, by the names of the recipe's fields (see data.latent_shards.facts)."""
    side = image_size // vae.stride
    return {
        "vae": weights_hash(vae), "vae_dtype": "fp32" if vae.dtype == torch.float32 else "bf16", "vae_batch": batch,
        "latent_convention": convention, "shape": [2 * vae.channels, side, side],
    }  # fmt: skip


def check_compiler(device: torch.device) -> None:
    """RuntimeError unless torch.compile can work on `device`: for the CPU it calls a C++ compiler."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise RuntimeError(
            "compile: torch.compile needs a C++ compiler on the CPU and none was found; install g++ or leave --compile out"
        )


def latents_key(recipe: Recipe, stage: Stage, store: SampleStore, vae: FrozenVAE) -> str:
    """Cache key of a stage's latents: everything that their bits depend on."""
    data = dataclasses.asdict(recipe.data)
    shards = [stamp for source in store.sources for stamp in source.stamps()]
    facts: dict[str, Any] = {
        "data": {key: data[key] for key in ("sources", "seed", "crop", "min_area", "interpolation", "flip", "background", "variants")},
        "shards": shards,
        "image_size": stage.image_size,
        "vae": weights_hash(vae),
        "convention": recipe.model.latent_convention,
        "posterior": recipe.model.posterior,
        "dtype": recipe.latent_dtype,
        "torch": torch.__version__,
        "decode": (DECODE_VERSION, PIL.__version__),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_same_recipe(recipe: Recipe, ranks: Ranks) -> None:
    """ValueError on every rank, naming the field, where a rank was started with another recipe."""
    own, *others = (dict(leaves(values)) for values in ranks.gather(recipe.to_dict()))
    for rank, other in enumerate(others, 1):
        for name in [*own, *(name for name in other if name not in own)]:
            if own.get(name) != other.get(name):
                raise ValueError(
                    f"the processes disagree: {name} is {own.get(name)!r} for rank 0 and {other.get(name)!r} for rank {rank}"
                )
