"""The paper's recipe for the B/2 tokenizer (arXiv 2601.15369, Table 1): 4000 + 400 ImageNet-equivalent epochs on Recap-DataComp-1B.

Learning rates are the official repository's rule, base * batch / 256: peaks 2.56e-4 and 6.4e-6. What the paper does not state is
OpenVision 1 and 2's (optimizer, inception crop of at least 40 %, bilinear filter, text towers), and each is a field.
`data.sources` names where img2dataset's shards are expected, with the recaptions joined to them (`ov3fast.data.join_captions`).
"""

from pathlib import Path

from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.losses import ObjectiveConfig
from ov3fast.models.config import (
    CaptionConfig,
    DecoderConfig,
    OpenVision3Config,
    TextConfig,
    vision_config,
)

from .config import OptimizerConfig, Recipe, Stage

RECAP_DATACOMP = SourceConfig(
    path="data/recap-datacomp-1b",
    captions=(("re_caption", 0.5), ("org_caption", 0.5)),
    caption_key="re_caption",
)

STAGES = (
    Stage(
        name="pretrain",
        image_size=128,
        batch_size=8192,
        base_lr=8e-6,
        epochs=4000,
        warmup_epochs=40,
        lpips_weight=0.0,
    ),
    Stage(
        name="finetune",
        image_size=256,
        batch_size=4096,
        base_lr=4e-7,
        epochs=400,
        warmup_epochs=20,
        lpips_weight=0.5,
    ),
)

RECIPE = Recipe(
    name="base",
    model=OpenVision3Config(
        vision=vision_config("B", image_size=256),
        decoder=DecoderConfig(width=768, depth=12, heads=12, mlp_dim=3072),
        text=TextConfig(width=512, depth=12, heads=8, mlp_dim=2048, vocab_size=32000, context_length=80),
        caption=CaptionConfig(width=512, depth=12, heads=8, mlp_dim=2048, vocab_size=32000, length=128, style="autoregressive"),
        tau=0.8,
    ),
    objective=ObjectiveConfig(
        rec_weight=0.5, und_weight=1.0, pixel_weight=1.0, latent_weight=0.4, caption_weight=1.0, contrastive_weight=1.0
    ),
    data=DataConfig(
        sources=(RECAP_DATACOMP,),
        crop="inception",
        min_area=0.4,
        interpolation="bilinear",
        decode="fast",
        workers=8,
        shard_window=64,
    ),
    stages=STAGES,
    optimizer=OptimizerConfig(betas=(0.9, 0.95), weight_decay=0.2, clip_norm=1.0),
    precision="bf16",
    activation_checkpointing=True,
    compile=True,
    checkpoint_minutes=30.0,
    run_dir=Path("runs/base"),
)
