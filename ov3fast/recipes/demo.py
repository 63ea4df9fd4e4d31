"""Every branch and every loss on real pictures, in minutes on two CPU cores.

64 px (8 x 8 latents, 16 tokens), the demo set of `ov3fast data demo`: 64 concepts a step in two picture styles, and 16 photos for the
reconstruction branch alone. A picture has 4 augmented versions, so the VAE encodes each once and the run reads latents. The
reconstruction branch and the captioner see a share of each batch; the second, shorter stage adds LPIPS, as in the paper. What
departs from the paper's weights does so because thousands of steps are not to be had: the caption weight leaves the encoder to the
contrastive loss.
"""

from pathlib import Path

from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.losses import ObjectiveConfig
from ov3fast.models.config import CaptionConfig, DecoderConfig, LPIPSConfig, OpenVision3Config, TextConfig, VisionConfig

from .config import OptimizerConfig, Recipe, Stage

RECIPE = Recipe(
    name="demo",
    model=OpenVision3Config(
        vision=VisionConfig(width=192, depth=6, heads=3, mlp_dim=768, image_size=64, embed_dim=192, residual_init=0.25),
        decoder=DecoderConfig(width=192, depth=3, heads=3, mlp_dim=768, residual_init=0.25),
        text=TextConfig(width=192, depth=3, heads=3, mlp_dim=768, context_length=12, pool="mean", residual_init=0.25),
        caption=CaptionConfig(
            width=192, depth=2, heads=3, mlp_dim=768, length=16, style="autoregressive", position="learned", residual_init=0.25
        ),
        logit_scale_init=20.0,
        vae="small",
    ),
    objective=ObjectiveConfig(caption_weight=0.5),
    lpips=LPIPSConfig(backbone="squeezenet"),
    data=DataConfig(
        sources=(
            SourceConfig(path="demo:pairs-train", fraction=128, group_by="concept", views=2, captions=(("name", 1.0),)),
            SourceConfig(path="demo:photos-train", fraction=16, paired=False),
        ),
        background="white",
        min_area=0.8,
        variants=4,
        cache_images=True,
    ),
    stages=(
        Stage(
            name="pretrain",
            image_size=64,
            batch_size=144,
            base_lr=1e-3,
            lr_rule="absolute",
            minutes=8.6,
            warmup_fraction=0.03,
            latent_images=48,
            pixel_images=4,
            caption_images=16,
        ),
        Stage(
            name="finetune",
            image_size=64,
            batch_size=144,
            base_lr=2e-4,
            lr_rule="absolute",
            minutes=0.8,
            warmup_fraction=0.05,
            lpips_weight=0.5,
            latent_images=48,
            pixel_images=4,
            caption_images=16,
        ),
    ),
    optimizer=OptimizerConfig(betas=(0.9, 0.95), weight_decay=0.2, clip_norm=1.0, ema_decay=0.99),
    precision="bf16",
    vae_dtype="bf16",
    cache_latents=True,
    restrict_vocabulary=True,
    compare_impl="reference",
    checkpoint_minutes=3.0,
    gradient_norms_every=50,
    run_dir=Path("runs/demo"),
)
