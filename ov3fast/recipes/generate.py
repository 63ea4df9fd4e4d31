"""Recipes for generators over a model's tokens: generate-demo, and generate-base, which follows RAE's training of DiT^DH."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class GenerateRecipe:
    """Recipe of `ov3fast train --recipe generate-...`; every field is a flag. ValueError for invalid values."""

    name: str = "generate-demo"
    model: str = "runs/demo"
    """Tokenizer: a trained OpenVision 3 model with its decoder (model folder, training run or hub id)."""
    vae: str | None = None
    """VAE to use instead of the model's."""
    data: tuple[str, ...] = ("demo:pairs-train", "demo:photos-train")
    """Training shards: folders, tars, patterns, or demo:SET."""
    condition: Literal["class", "text"] = "class"
    """class: one label per value of class_field; text: the caption's tokens from the model's text tower."""
    heldout: tuple[str, ...] = ("demo:pairs-unseen", "demo:photos-heldout")
    """Shards of real images not used for training, the report's control. Empty: no report."""
    class_field: str = "group"
    """Metadata field with the class name."""
    widths: tuple[int, int] = (384, 768)
    """Widths of trunk and head."""
    depths: tuple[int, int] = (12, 2)
    heads: tuple[int, int] = (6, 12)
    in_context: bool = False
    """Use RAEv2's generator (predicts x, internal guidance) instead of RAE's."""
    predicts: Literal["velocity", "x"] = "velocity"
    """What RAE's generator predicts; the loss is on the velocity either way."""
    time_shift: float | None = None
    """Time shift in training and sampling; above 1, towards noise. None: sqrt(channels * height * width / 4096)."""
    batch_size: int = 128
    steps: int = 10_000
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices (updates scaled to match AdamW's, so the same lr works), AdamW for the rest."""
    lr: float = 2e-4
    """Constant after warm-up until half of the steps, then decayed linearly to a tenth."""
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    dropout: float = 0.1
    """Fraction of samples trained without their condition, for classifier-free guidance."""
    flip: bool = True
    """Also train on mirrored images."""
    token_cache: Path | None = None
    """Folder for the tokens in bfloat16, encoded once and read as needed, for data larger than memory; all processes must have
    access to it. None: keep the tokens in memory, in float32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Multiple processes: ddp replicates the generator, fsdp shards it (FSDP2; not with muon, which needs whole matrices)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    checkpoint_every: int = 300
    log_every: int = 20
    run_dir: Path = Path("runs/generate-demo")

    def __post_init__(self) -> None:
        positive = {name: getattr(self, name) for name in ("batch_size", "steps", "checkpoint_every", "log_every", "lr")}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"recipe: {name} must be positive, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"recipe: dropout must be in [0, 1), got {self.dropout}")
        if self.time_shift is not None and self.time_shift <= 0:
            raise ValueError(f"recipe: time_shift must be positive, got {self.time_shift}")
        if self.parallel == "fsdp" and self.optimizer == "muon":
            raise ValueError("recipe: optimizer muon needs whole matrices; choose parallel ddp, or optimizer adamw")
        if not self.data:
            raise ValueError("recipe: data must name at least one set of shards")

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        late = max(0.0, 2 * step / self.steps - 1)
        return self.lr * (1 - 0.9 * late)


IMAGENET_IMAGES, RAE_BATCH, RAE_EPOCHS = 1_281_167, 1024, 80

GENERATE_RECIPES = {
    # Ten minutes is short for a generator: a small one that sees each image forty times makes better samples than a larger one
    # that sees it ten times. The decoders tolerate noise, so times are shifted towards it, where an image's content is decided.
    "generate-demo": GenerateRecipe(
        widths=(192, 192), depths=(4, 2), heads=(3, 3), predicts="x", time_shift=3.0, optimizer="muon", lr=2e-3, warmup_steps=40,
        batch_size=256, steps=1100,
    ),
    "generate-base": GenerateRecipe(
        name="generate-base", model="runs/base", data=("imagenet-train",), class_field="class", widths=(1152, 2048), depths=(28, 2),
        heads=(16, 16), heldout=(), token_cache=Path("runs/generate-base/tokens"), batch_size=RAE_BATCH, steps=math.ceil(RAE_EPOCHS * IMAGENET_IMAGES / RAE_BATCH), lr=2e-4, warmup_steps=1250,
        ema_decay=0.9995, checkpoint_every=2500, log_every=100, run_dir=Path("runs/generate-base"),
    ),
}  # fmt: skip
