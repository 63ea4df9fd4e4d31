"""A full run small enough for a test: data, VAE and recipe. As a script it runs the recipe, for tests that need a process.

python training_run.py FOLDER RUN_DIR [--kill-at STEP] [field=value ...]        e.g. accumulate=2
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.data.shards import write_shards
from ov3fast.losses import ObjectiveConfig
from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.recipes import OptimizerConfig, Recipe, Stage

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("square", "disc", "bar", "cross")


def picture(colour: int, shape: int, style: int) -> bytes:
    from PIL import Image, ImageDraw

    rgb = ((220, 30, 30), (30, 180, 60), (40, 60, 220), (230, 220, 40), (20, 20, 20), (250, 250, 250))[colour]
    image = Image.new("RGB", (48, 48), (128, 128, 128 + 40 * style))
    draw = ImageDraw.Draw(image)
    low, high = 10 - 4 * style, 36 + 4 * style
    if shape == 0:
        draw.rectangle((low, low, high, high), fill=rgb)
    elif shape == 1:
        draw.ellipse((low, low, high, high), fill=rgb)
    elif shape == 2:
        draw.rectangle((low, 20, high, 28), fill=rgb)
    else:
        draw.rectangle((low, 20, high, 28), fill=rgb)
        draw.rectangle((20, low, 28, high), fill=rgb)
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def write_data(folder: Path) -> None:
    """24 concepts in two styles with captions, 16 photos without, and an untrained VAE."""
    pairs = []
    for number in range(len(COLOURS) * len(SHAPES) * 2):
        concept, style = divmod(number, 2)
        colour, shape = divmod(concept, len(SHAPES))
        name = f"{COLOURS[colour]} {SHAPES[shape]}"
        text = {"captions": {"name": name, "caption": f"a picture of a {name}"}, "meta": {"concept": name}}
        pairs.append((f"{concept:02d}-{style}", {"png": picture(colour, shape, style), "json": json.dumps(text).encode()}))
    write_shards(pairs, folder / "pairs", samples_per_shard=20)
    random = np.random.default_rng(0)
    photos = []
    for number in range(16):
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (40, 56, 3), np.uint8)).save(stream, "png")
        photos.append((f"photo-{number:02d}", {"png": stream.getvalue(), "json": b"{}"}))
    write_shards(photos, folder / "photos", samples_per_shard=20)

    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.8,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder / "vae")


def recipe(folder: Path, run_dir: Path, stages: Any = ((4, 32), (4, 48)), **changes: Any) -> Recipe:
    """stages: (steps, image size) each, with 24 images per step: 8 concepts in two styles and 8 photos."""
    width = dict(width=32, depth=1, heads=2, mlp_dim=48)
    defaults = dict(
        name="tiny",
        model=OpenVision3Config(
            vision=VisionConfig(**width, in_channels=4, image_size=32, embed_dim=16),
            decoder=DecoderConfig(**width),
            text=TextConfig(**width, context_length=8),
            caption=CaptionConfig(**width, length=10),
            vae=str(folder / "vae"),
        ),
        objective=ObjectiveConfig(),
        data=DataConfig(
            sources=(
                SourceConfig(path=str(folder / "pairs"), fraction=2, group_by="concept", views=2),
                SourceConfig(path=str(folder / "photos"), fraction=1, paired=False),
            ),
            variants=2,
            cache_images=True,
        ),
        stages=tuple(
            Stage(
                name=f"s{number}",
                image_size=size,
                batch_size=24,
                base_lr=1e-3,
                lr_rule="absolute",
                steps=steps,
                warmup_steps=min(2, steps),
                pixel_images=8,
                caption_images=8,
            )
            for number, (steps, size) in enumerate(stages)
        ),
        optimizer=OptimizerConfig(eps=1e-6, ema_decay=0.9),
        precision="fp32",
        cache_latents=True,
        restrict_vocabulary=True,
        checkpoint_steps=3,
        checkpoint_minutes=None,
        keep=10,
        log_every=1,
        gradient_norms_every=2,
        run_dir=run_dir,
    )
    return Recipe(**{**defaults, **changes})


def with_stages(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with these fields in all of its stages."""
    return dataclasses.replace(recipe, stages=tuple(dataclasses.replace(stage, **changes) for stage in recipe.stages))


def main(folder: str, run_dir: str, *rest: str) -> None:
    """Runs the recipe; with --kill-at the process is killed by SIGKILL during that step's update, after the previous step was saved."""
    import os
    import signal

    from ov3fast import ops
    from ov3fast.training import train

    torch.set_num_threads(1)
    update, fatal = ops.adamw_ema_, int(rest[rest.index("--kill-at") + 1]) if "--kill-at" in rest else None

    def dying(*arguments: Any, **options: Any) -> Any:
        result = update(*arguments, **options)
        if options["step"] == fatal:
            while not Path(run_dir, "checkpoints", f"step-{fatal - 1:08d}").is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    ops.adamw_ema_ = dying
    fields = {key: json.loads(value) for key, value in (item.split("=", 1) for item in rest if "=" in item)}
    train(recipe(Path(folder), Path(run_dir), **fields))


if __name__ == "__main__":
    main(*sys.argv[1:])
