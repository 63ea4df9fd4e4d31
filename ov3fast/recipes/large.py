"""The paper's recipe with the L/2 tokenizer: an L encoder and OpenVision 1's L text towers; all else as in base.

The reconstruction decoder stays B/1: the paper finds L/1 unstable (section 5.3).
"""

import dataclasses
from pathlib import Path

from ov3fast.models.config import CaptionConfig, TextConfig, vision_config

from . import base

RECIPE = dataclasses.replace(
    base.RECIPE,
    name="large",
    model=dataclasses.replace(
        base.RECIPE.model,
        vision=vision_config("L", image_size=256),
        text=TextConfig(width=768, depth=12, heads=12, mlp_dim=3072, vocab_size=32000, context_length=80),
        caption=CaptionConfig(
            width=768, depth=12, heads=12, mlp_dim=3072, vocab_size=32000, length=128, style="autoregressive"
        ),
    ),
    run_dir=Path("runs/large"),
)
