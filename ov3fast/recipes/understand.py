"""Recipes for language models on a frozen tower: understand-demo, and understand-base, which follows LLaVA-1.5's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Trains = Literal["projector", "language_model", "both", "lora"]


@dataclass(frozen=True)
class UnderstandStage:
    """One stage of a run, on one file of conversations; optimizer and schedule (warm-up, then cosine to 0) restart in each."""

    name: str = "align"
    data: str = ""
    """Conversations in LLaVA's JSON format; "demo:captions" or "demo:questions" for those the demo generates."""
    images: str = ""
    """Folder with the images that the conversations name."""
    trains: Trains = "projector"
    """projector; both: projector and full language model; lora: projector and low-rank updates of the language model's linear
    layers, merged when the stage ends; language_model: the language model alone, on text only."""
    template: str = ""
    """Prompt template; "": the recipe's."""
    epochs: float | None = None
    steps: int | None = None
    """Instead of epochs."""
    batch_size: int = 128
    """Rows per step; a packed row holds several conversations."""
    micro_batch: int | None = None
    """Rows per forward pass (gradient accumulation); the gradient is that of the whole batch."""
    lr: float = 1e-3
    warmup: float = 0.03
    """Fraction of the steps."""
    weight_decay: float = 0.0
    max_length: int = 2048
    """Tokens per row; longer conversations are truncated at the end."""
    packed: bool = False
    """Pack several conversations into a row, without attention between them; False: one per row, padded."""

    def __post_init__(self) -> None:
        what = f"stage {self.name!r}"
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"{what}: give epochs or steps, one of them")
        for name in ("epochs", "steps", "batch_size", "micro_batch", "lr", "max_length"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{what}: {name} must be positive, got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"{what}: warmup must be in [0, 1), got {self.warmup}")


@dataclass(frozen=True)
class SmallLanguageModel:
    """A randomly initialized Qwen2 of this size, with a vocabulary built from the run's own texts."""

    width: int = 192
    depth: int = 4
    heads: int = 3
    mlp_dim: int = 512

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"small: width must be an even multiple of heads, got {self.width} and {self.heads}")


@dataclass(frozen=True)
class UnderstandRecipe:
    """What `ov3fast train --recipe understand-...` trains; every field is a flag."""

    name: str = "understand-demo"
    tower: str = "runs/demo"
    """OpenVision 3 (model folder, training run, released tower or hub id), or a CLIP or SigLIP model for transformers."""
    vae: str | None = None
    """VAE to use instead of the tower's."""
    feature_layer: int = -2
    """Hidden states used as features, indexed as in transformers: -1 for the last block, -2 for the one before, as in LLaVA."""
    image_aspect: Literal["pad", "crop"] = "pad"
    """pad: to a square, with grey; crop: resize the shorter side, then centre-crop."""
    language_model: str = ""
    """Causal language model for transformers, with its tokenizer, as a folder or hub id; "": `small`, from scratch."""
    trust_remote_code: bool = False
    """For models that ship their own code, such as OpenELM."""
    small: SmallLanguageModel = field(default_factory=SmallLanguageModel)
    template: str = "vicuna"
    """vicuna, chatml, short or plain."""
    stages: tuple[UnderstandStage, ...] = ()
    lora_rank: int = 128
    lora_alpha: float = 256.0
    sighted: bool = True
    """False trains the control: the same language model, texts and steps, without image tokens."""
    cache_features: bool = False
    """Run every image through the tower once and keep its features in memory."""
    precision: Literal["fp32", "bf16"] = "bf16"
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    run_dir: Path = Path("runs/understand-demo")

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "log_every", "lora_rank", "lora_alpha", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"recipe: {name} must be positive, got {getattr(self, name)}")
        if not self.stages:
            raise ValueError("recipe: stages must have at least one stage")


UNDERSTAND_RECIPES = {
    "understand-demo": UnderstandRecipe(
        feature_layer=-1,
        image_aspect="crop",
        template="short",
        stages=(
            UnderstandStage(
                name="captions", data="demo:captions", trains="both", template="plain", steps=300, batch_size=64, lr=2e-3, max_length=64
            ),
            UnderstandStage(name="questions", data="demo:questions", trains="both", steps=900, batch_size=64, lr=1.5e-3, max_length=128),
        ),
        cache_features=True,
    ),
    "understand-base": UnderstandRecipe(
        name="understand-base",
        tower="runs/base",
        language_model="Qwen/Qwen2-0.5B-Instruct",
        template="chatml",
        stages=(
            UnderstandStage(
                name="align", data="blip_laion_cc_sbu_558k.json", images="LLaVA-Pretrain", template="plain", epochs=1, batch_size=256
            ),
            UnderstandStage(
                name="instruct", data="llava_v1_5_mix665k.json", images="LLaVA-Tuning", trains="both", epochs=1, lr=2e-5, micro_batch=16
            ),
        ),
        run_dir=Path("runs/understand-base"),
    ),
}  # fmt: skip
