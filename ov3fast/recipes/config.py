"""What a training run is: one frozen, typed `Recipe`, whose fields are also the command line's flags.

    Recipe
      model        OpenVision3Config     what is trained
      objective    ObjectiveConfig       the losses' weights
      data         DataConfig            what it is trained on
      stages       Stage, Stage, ...     resolution, batch, length and rate of each part of the run, in order
      optimizer    OptimizerConfig

A stage's length is exactly one of epochs, steps and minutes. The recipe is stored with every checkpoint; a resumed run
must have the same one, apart from FREE_TO_CHANGE.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ov3fast.data.config import DataConfig
from ov3fast.losses import ObjectiveConfig
from ov3fast.models.config import VAE_STRIDE, LPIPSConfig, OpenVision3Config
from ov3fast.recipes.plain import build, leaves, to_plain

IMAGENET = 1_281_167
"""Samples of an "ImageNet-equivalent" epoch, the paper's unit."""

FREE_TO_CHANGE = frozenset(
    {
        "run_dir",
        "accumulate",
        "parallel",
        "shard_size",
        "reshard",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep",
        "keep_every",
        "checkpoint_dir",
        "on_spike",
        "wall_minutes",
        "rank_timeout_minutes",
        "wandb",
        "log_every",
        "gradient_norms_every",
        "synchronize_timing",
        "compare_impl",
        "compare_rounds",
        "save_latents",
        "data.workers",
        "data.threads",
        "data.cache_dir",
        "data.cache_gib",
        "data.read_ahead",
        "data.cache_images",
        "data.skip_budget",
    }
)
"""Fields that may differ when a run is resumed: none of them changes what the run computes. (`accumulate`, `parallel` and `shard_size` change
the order of sums, as another number of processes does.)"""


@dataclass(frozen=True)
class Stage:
    """One part of a run: a resolution, a batch, a learning rate and a length."""

    name: str
    image_size: int
    """Side of the training images in pixels."""
    batch_size: int
    """Images per optimizer step, over all ranks and accumulated micro-batches."""
    base_lr: float
    """Learning rate, read by lr_rule."""
    lr_rule: Literal["base*batch/256", "absolute"] = "base*batch/256"
    """Peak rate: base_lr * batch_size / 256 (the official repository's rule), or base_lr as it is."""
    epochs: float | None = None
    """Length in epochs of samples_per_epoch samples. Exactly one of epochs, steps and minutes is set."""
    steps: int | None = None
    """Length in optimizer steps."""
    minutes: float | None = None
    """Length in wall time: the cosine runs over it, and the stage ends with it whatever the machine's speed."""
    samples_per_epoch: int = IMAGENET
    """Samples of one epoch, for epochs and warmup_epochs."""
    warmup_epochs: float | None = None
    """Linear warm-up in epochs. At most one of the three warm-ups is set; none means no warm-up."""
    warmup_steps: int | None = None
    """Linear warm-up in steps."""
    warmup_fraction: float | None = None
    """Linear warm-up as a share of the stage, 0 to 1."""
    lpips_weight: float = 0.0
    """Weight (lambda) of LPIPS in this stage; 0 leaves the network out."""
    latent_images: int | None = None
    """Images per step that the reconstruction branch sees (ViT decoder, latent L1); None: all."""
    pixel_images: int | None = None
    """Images per step, of latent_images, that go through the VAE decoder for the pixel losses (L1 and LPIPS); None: all; 0: none."""
    caption_images: int | None = None
    """Images per step that are captioned; None: all that have a caption; 0: none."""

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        lengths = {n: getattr(self, n) for n in ("epochs", "steps", "minutes") if getattr(self, n) is not None}
        if len(lengths) != 1:
            raise ValueError(f"{where}: set exactly one of epochs, steps and minutes, got {lengths or 'none'}")
        for name, value in lengths.items():
            if not value > 0:
                raise ValueError(f"{where}: {name} must be positive, got {value}")
        warmups = [n for n in ("warmup_epochs", "warmup_steps", "warmup_fraction") if getattr(self, n) is not None]
        if len(warmups) > 1:
            raise ValueError(
                f"{where}: set at most one of warmup_epochs, warmup_steps and warmup_fraction, got {', '.join(warmups)}"
            )
        if warmups and getattr(self, warmups[0]) < 0:
            raise ValueError(f"{where}: {warmups[0]} must not be negative, got {getattr(self, warmups[0])}")
        if self.warmup_fraction is not None and self.warmup_fraction > 1:
            raise ValueError(f"{where}: warmup_fraction must be in [0, 1], got {self.warmup_fraction}")
        if self.warmup_epochs is not None and self.minutes is not None:
            raise ValueError(f"{where}: a stage measured in minutes takes warmup_fraction or warmup_steps, got warmup_epochs")
        for name in ("batch_size", "samples_per_epoch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}: {name} must be at least 1, got {getattr(self, name)}")
        if self.base_lr < 0 or self.lpips_weight < 0:
            raise ValueError(
                f"{where}: base_lr and lpips_weight must not be negative, got {self.base_lr} and {self.lpips_weight}"
            )
        if self.latent_images is not None and not 1 <= self.latent_images <= self.batch_size:
            raise ValueError(f"{where}: latent_images must be in 1..batch_size = {self.batch_size}, got {self.latent_images}")
        for name, most in (("pixel_images", "latent_images"), ("caption_images", "batch_size")):
            value, limit = getattr(self, name), getattr(self, most)
            most, limit = (most, limit) if limit is not None else ("batch_size", self.batch_size)
            if value is not None and not 0 <= value <= limit:
                raise ValueError(f"{where}: {name} must be in 0..{most} = {limit}, got {value}")
        if self.lpips_weight and self.pixel_images == 0:
            raise ValueError(f"{where}: lpips_weight {self.lpips_weight} needs pixel_images above 0, got 0")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the official repository's betas and decay; clipping and EMA in the same pass over memory."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.2
    """On the weights of linear layers only: not on norms, biases, embeddings, positions, queries and scalars."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    ema_decay: float | None = None
    """Decay of the weights' moving average; None: no average is kept. The first steps use (1 + step) / (10 + step) if that is less."""
    min_lr: float = 0.0
    """Where the cosine ends."""

    def __post_init__(self) -> None:
        for name, value in (("betas[0]", self.betas[0]), ("betas[1]", self.betas[1]), ("ema_decay", self.ema_decay or 0.0)):
            if not 0 <= value < 1:
                raise ValueError(f"optimizer: {name} must be in [0, 1), got {value}")
        if self.eps <= 0 or self.weight_decay < 0 or self.min_lr < 0:
            raise ValueError(
                f"optimizer: eps must be positive, weight_decay and min_lr not negative; got {self.eps}, {self.weight_decay}, {self.min_lr}"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer: clip_norm must be positive or None, got {self.clip_norm}")


@dataclass(frozen=True)
class Recipe:
    """A whole training run."""

    name: str
    model: OpenVision3Config = field(default_factory=OpenVision3Config)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The losses' weights and reductions; lpips_weight comes from the stage."""
    lpips: LPIPSConfig = field(default_factory=LPIPSConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: tuple[Stage, ...] = ()
    """The run's parts, in order; weights, optimizer and EMA carry over, the learning rate starts anew."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    """Names the initial weights, the sample order, the augmentation and the noise."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast with float32 weights; the VAE keeps its own dtype."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    contrastive_over: Literal["batch", "micro-batch"] = "batch"
    """With accumulate > 1: which texts an image is told apart from. "batch" is exact (the loss of the unaccumulated step) for one
    more forward pass of the encoder and the text encoder; "micro-batch" has fewer negatives."""
    contrastive_exchange: Literal["gather", "ring"] = "gather"
    """How texts cross the ranks in the contrastive loss: "gather" brings all to every rank; "ring" passes them on from rank to rank,
    a few pieces at a time in memory, while tiles are computed. The same loss; another order of sums."""
    activation_checkpointing: bool = False
    """Recompute each transformer block in the backward pass: less memory, about a third more time."""
    recompute: Literal["block", "mlp"] = "block"
    """What activation_checkpointing recomputes: whole blocks, or (selective) their MLPs alone, which spares about half of the memory for a fifth
    more time."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How several processes hold the model: each of them whole (ddp), a share each (fsdp), or a share each within `shard_size` of them and
    copies beyond (hsdp)."""
    shard_size: int | None = None
    """hsdp: processes that share one copy of the model; None: those of a node."""
    reshard: bool = True
    """fsdp, hsdp: free a block's gathered weights after its forward pass and gather them again in the backward pass; False keeps them:
    more memory, a third less traffic."""
    impl: str | None = None
    """Backend of every operator that has it (see ov3fast doctor); None: each operator takes its fastest."""
    compare_impl: str | None = None
    """Before the first step, also time whole steps with this backend, in turn with the chosen ones; None: don't."""
    compare_rounds: int = 6
    """Turns of that comparison."""
    compile: bool = False
    """torch.compile of the four towers, block by block: a tower's blocks share what is compiled."""
    capture: bool = False
    """Record a step as CUDA graphs and replay them: Python's time goes. One process, on a GPU."""
    cache_latents: bool = False
    """Encode all (sample, variant) pairs with the VAE once at a stage's start and keep the latents in memory; needs data.variants."""
    latent_dtype: Literal["fp32", "bf16"] = "fp32"
    """How cached latents are kept."""
    save_latents: bool = True
    """Keep the cached latents in run_dir too, so that a resumed run need not encode again."""
    restrict_vocabulary: bool = False
    """Keep only the WordPiece pieces that the training captions use (and every character): a small vocabulary for small sets."""
    vocab_file: Path | None = None
    """Vocabulary of the tokenizer; None: the package's WordPiece. CLIP's BPE needs it."""
    vae: str | None = None
    """Folder or hub id of the VAE, or "small"; None: model.vae."""
    vae_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the frozen VAE computes in; the authors' script encodes in fp32."""
    vae_batch: int | None = None
    """Images per call of the VAE's encoder, the last call padded, so that an image's latents are the same bits in every batch: with
    it a run that reads data.latents equals the run that encodes as it goes. None: a micro-batch in one call."""
    checkpoint_steps: int | None = None
    """Checkpoint every so many steps."""
    checkpoint_minutes: float | None = 10.0
    """Checkpoint after so many minutes."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept too; None: none of them."""
    checkpoint_dir: str | None = None
    """Where checkpoints go: a folder or an fsspec URL (s3://bucket/run); None: run_dir/checkpoints. All processes must see it."""
    on_spike: Literal["abort", "skip", "rollback"] = "abort"
    """After a loss or gradient that is not finite, or a spike: end the run; go on without that step's update; or go back to the last
    checkpoint of the stage and on without the samples since then. The samples' keys are written to run_dir."""
    spike_factor: float | None = None
    """A loss this many times the median of the last 64 is a spike; None: no loss is."""
    wall_minutes: float | None = None
    """Wall time of the job: the run saves and stops before it is over, with the exit code of a signal; None: no limit."""
    rank_timeout_minutes: float = 30.0
    """How long a process waits for the others before the run ends with an error; the longest wait is for a stage's cached latents."""
    wandb: str | None = None
    """Project of Weights & Biases that the log's rows go to as well; needs wandb."""
    log_every: int = 10
    """Steps between two rows of the log; a row holds the means since the last."""
    gradient_norms_every: int | None = 100
    """Steps between two measurements of each branch's gradient at the tokens; None: never."""
    synchronize_timing: bool = False
    """Wait for the GPU around each timed part: true times of the parts, slower steps."""
    run_dir: Path = Path("runs/run")
    """Where checkpoints, logs and the final model go."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("recipe: stages must hold at least one stage, got none")
        if self.accumulate < 1 or self.keep < 1 or self.log_every < 1:
            raise ValueError(
                f"recipe: accumulate, keep and log_every must be at least 1, got {self.accumulate}, {self.keep} and {self.log_every}"
            )
        stride = VAE_STRIDE * self.model.vision.patch_size
        for stage in self.stages:
            if stage.image_size % stride or stage.image_size < stride:
                raise ValueError(
                    f"stage {stage.name!r}: image_size must be a multiple of {stride} pixels, got {stage.image_size}"
                )
            if stage.batch_size % self.accumulate:
                raise ValueError(
                    f"stage {stage.name!r}: batch_size {stage.batch_size} is not divisible by accumulate = {self.accumulate}"
                )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"recipe: stages must have different names, got {', '.join(names)}")
        for name in (
            "checkpoint_steps",
            "checkpoint_minutes",
            "keep_every",
            "wall_minutes",
            "rank_timeout_minutes",
            "gradient_norms_every",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"recipe: {name} must be positive or None, got {value}")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"recipe: spike_factor must be above 1 or None, got {self.spike_factor}")
        if self.shard_size is not None and (self.shard_size < 1 or self.parallel != "hsdp"):
            raise ValueError(
                f"recipe: shard_size is for parallel 'hsdp' and at least 1, got {self.shard_size} with {self.parallel!r}"
            )
        if self.objective.contrastive != self.model.contrastive:
            raise ValueError(
                f"recipe: objective.contrastive is {self.objective.contrastive!r}, model.contrastive {self.model.contrastive!r}; set both"
            )
        if self.data.latents is not None and (self.cache_latents or not self.data.variants):
            raise ValueError(
                f"recipe: data.latents needs data.variants, the number of crops that it holds, and cache_latents off; got "
                f"{self.data.variants} and {self.cache_latents}"
            )
        if self.cache_latents and not (self.data.variants and self.data.cache_images):
            raise ValueError(
                f"recipe: cache_latents needs data.variants and data.cache_images, got {self.data.variants} and {self.data.cache_images}"
            )
        if self.vae_batch is not None and self.vae_batch < 1:
            raise ValueError(f"recipe: vae_batch must be at least 1 or None, got {self.vae_batch}")
        if self.restrict_vocabulary and self.model.tokenizer != "wordpiece":
            raise ValueError(
                f"recipe: restrict_vocabulary works on wordpiece only, got model.tokenizer {self.model.tokenizer!r}"
            )
        if self.objective.lpips_weight:
            raise ValueError(
                "recipe: LPIPS is weighted by stage; set stages.N.lpips_weight and leave objective.lpips_weight at 0"
            )

    def resolve(self) -> Recipe:
        """The same with `vae` written into the model's config, and ~ of run_dir expanded."""
        recipe = dataclasses.replace(self, run_dir=self.run_dir.expanduser())
        if self.vae is None or self.vae == self.model.vae:
            return recipe
        return dataclasses.replace(recipe, model=dataclasses.replace(self.model, vae=self.vae, vae_subfolder=None))

    @property
    def checkpoints(self) -> str:
        """Where checkpoints go: a folder or a URL."""
        return self.checkpoint_dir or str(self.run_dir / "checkpoints")

    def stage_objective(self, stage: Stage) -> ObjectiveConfig:
        """The objective with the stage's LPIPS weight; without pixel losses where it decodes no image."""
        pixel = self.objective.pixel_weight if stage.pixel_images != 0 else 0.0
        return dataclasses.replace(self.objective, pixel_weight=pixel, lpips_weight=stage.lpips_weight)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, ready for JSON."""
        values: dict[str, Any] = to_plain(self)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of to_dict; former names of fields are read too. ValueError names an unknown key."""
        recipe: Recipe = build(cls, values, cls.__name__)
        return recipe

    def difference(self, other: dict[str, Any], longer: bool = False) -> str | None:
        """The first field in which another recipe's to_dict differs, as "field: other -> own", FREE_TO_CHANGE aside; None: none.

        A field that the other was written without has its default. longer: stages may have become longer, and others may follow them.
        ValueError names a key that is unknown here.
        """
        former = Recipe.from_dict(other)
        if longer:
            former = _lengthened(former, self)
        own, theirs = dict(leaves(self.to_dict())), dict(leaves(former.to_dict()))
        for name in [*own, *(name for name in theirs if name not in own)]:
            a, b = theirs.get(name, "absent"), own.get(name, "absent")
            if a != b and name not in FREE_TO_CHANGE:
                return f"{name}: {a!r} -> {b!r}"
        return None


def _lengthened(recipe: Recipe, like: Recipe) -> Recipe:
    """The recipe with its stages as long as those of `like` where these are longer, and with the stages of `like` behind them."""
    stages = []
    for stage, other in zip(recipe.stages, like.stages, strict=False):
        lengths = {
            name: getattr(other, name) for name in ("epochs", "steps", "minutes")
            if getattr(stage, name) is not None and (getattr(other, name) or 0) > getattr(stage, name)
        }  # fmt: skip
        stages.append(dataclasses.replace(stage, **lengths))
    return dataclasses.replace(recipe, stages=(*stages, *like.stages[len(stages) :], *recipe.stages[len(stages) :]))
