"""A folder of tar shards of one's own: `ov3fast train --data shards/`. Every field can be changed by its flag.

A small model at 64 px with the package's VAE, in defaults that a CPU bears; `fit` looks at the shards for what depends on them: the
captions' keys, or that there are none, and the batch.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from ov3fast.data.captions import texts_under
from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.data.shards import ShardDataset
from ov3fast.data.skips import DataError, SampleError, SkipWarning
from ov3fast.losses import ObjectiveConfig
from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig

from .config import OptimizerConfig, Recipe, Stage

LOOKED_AT = 64
"""Samples whose captions are looked at."""

_WIDTH: dict[str, Any] = dict(width=192, heads=3, mlp_dim=768, residual_init=0.25)

RECIPE = Recipe(
    name="custom",
    model=OpenVision3Config(
        vision=VisionConfig(depth=6, image_size=64, embed_dim=192, **_WIDTH),
        decoder=DecoderConfig(depth=3, **_WIDTH),
        text=TextConfig(depth=3, context_length=64, pool="mean", **_WIDTH),
        caption=CaptionConfig(depth=2, length=64, style="autoregressive", position="learned", **_WIDTH),
        logit_scale_init=20.0,
        vae="small",
    ),
    objective=ObjectiveConfig(),
    data=DataConfig(sources=(SourceConfig(path="shards"),), min_area=0.4, shard_window=64),
    stages=(
        Stage(
            name="train",
            image_size=64,
            batch_size=64,
            base_lr=1e-3,
            lr_rule="absolute",
            steps=2000,
            warmup_fraction=0.03,
            pixel_images=4,
        ),
    ),
    optimizer=OptimizerConfig(ema_decay=0.99),
    restrict_vocabulary=True,
    checkpoint_minutes=5.0,
    run_dir=Path("runs/custom"),
)


def fit(path: str) -> Recipe:
    """RECIPE with the shards in `path` as its source. DataError where no sample can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)  # the run's own start says it
        dataset = ShardDataset(path)
    keys: dict[str, int] = {}
    read = 0
    for number in range(min(LOOKED_AT, len(dataset))):
        try:
            captions = dataset.text(number).captions
        except SampleError:
            continue  # counted when its turn comes
        read += 1
        for key in [key for key in captions if texts_under(captions, key)]:
            keys[key] = keys.get(key, 0) + 1
    if not read:
        raise DataError(f"--data: none of the first samples of {path} could be read; see `ov3fast data check {path}`")
    common = [key for key, count in keys.items() if 2 * count >= read]
    captioned = [key for key in common if key in ("txt", "caption", "text")] or common
    if keys and not common:
        key, count = max(keys.items(), key=lambda item: item[1])
        warnings.warn(
            f"--data: {count} of the {read} samples looked at have a caption ({key}), fewer than half: pictures alone are trained",
            stacklevel=2,
        )
    (stage,) = RECIPE.stages
    batch = min(stage.batch_size, len(dataset))
    stage = dataclasses.replace(stage, batch_size=batch, pixel_images=min(stage.pixel_images or batch, batch))
    if captioned:
        choices = tuple((key, 1.0 / len(captioned)) for key in captioned)
        source = SourceConfig(path=path, captions=choices, caption_key=captioned[0])
        objective, restrict = RECIPE.objective, True
    else:  # pictures alone: the reconstruction branch
        source = SourceConfig(path=path, paired=False)
        objective, restrict = dataclasses.replace(RECIPE.objective, und_weight=0.0), False
    return dataclasses.replace(
        RECIPE,
        data=dataclasses.replace(RECIPE.data, sources=(source,)),
        stages=(stage,),
        objective=objective,
        restrict_vocabulary=restrict,
    )
