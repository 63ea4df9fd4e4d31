"""Every branch and every loss on real pictures, in minutes on two CPU cores.

64 px (8 x 8 latents, 16 tokens), the demo set of `ov3fast data demo`: 128 concepts a step in two picture styles, and 32 photos for the
reconstruction branch alone. A picture has 8 augmented versions, so the VAE encodes each once and the run reads latents. Pixel losses
and captions see a share of each batch; the second, shorter stage adds LPIPS, as in the paper.
"""

from pathlib import Path

from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.losses import ObjectiveConfig
from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig

from .config import LPIPSConfig, OptimizerConfig, Recipe, Stage

RECIPE = Recipe(
    name="demo",
    model=OpenVision3Config(
        vision=VisionConfig(width=192, depth=6, heads=3, mlp_dim=768, image_size=64, embed_dim=192, residual_init=0.25),
        decoder=DecoderConfig(width=192, depth=3, heads=3, mlp_dim=768, residual_init=0.25),
        text=TextConfig(width=192, depth=4, heads=3, mlp_dim=768, context_length=16, residual_init=0.25),
        caption=CaptionConfig(
            width=192, depth=2, heads=3, mlp_dim=768, length=16, style="autoregressive", position="learned", residual_init=0.25
        ),
        vae="small",
    ),
    objective=ObjectiveConfig(),
    lpips=LPIPSConfig(backbone="squeezenet"),
    data=DataConfig(
        sources=(
            SourceConfig(path="demo:pairs-train", fraction=256, group_by="concept", views=2),
            SourceConfig(path="demo:photos-train", fraction=32, paired=False),
        ),
        variants=8,
        cache_images=True,
    ),
    stages=(
        Stage(
            name="pretrain",
            image_size=64,
            batch_size=288,
            base_lr=1e-3,
            lr_rule="absolute",
            minutes=5.0,
            warmup_fraction=0.03,
            pixel_images=16,
            caption_images=64,
        ),
        Stage(
            name="finetune",
            image_size=64,
            batch_size=288,
            base_lr=2e-4,
            lr_rule="absolute",
            minutes=1.0,
            warmup_fraction=0.05,
            lpips_weight=0.5,
            pixel_images=16,
            caption_images=64,
        ),
    ),
    optimizer=OptimizerConfig(betas=(0.9, 0.95), weight_decay=0.2, clip_norm=1.0, ema_decay=0.99),
    precision="bf16",
    cache_latents=True,
    restrict_vocabulary=True,
    checkpoint_minutes=2.0,
    gradient_norms_every=50,
    run_dir=Path("runs/demo"),
)
