"""The released vision towers (openvision3-vit-base-patch2-32 and its kin): open_clip's layout <-> ViTEncoder.

Keys, shapes and forward contract: the official repository's src/convert_upload/open_clip (model.py, transformer.py,
factory.py). The files hold the vision tower alone: no text towers, no reconstruction decoder, no VAE.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast.io import atomic_folder

from . import pretrained
from .config import DEFAULT_VAE, VAE_STRIDE, VisionConfig
from .vae import FrozenVAE, check_convention
from .vit import ViTEncoder

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)

# Ours -> theirs, within a block.
_BLOCK_KEYS = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}

# Fields that are read, and fields that change nothing here: training-only, or forced in the official code.
_READ = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "in_channels", "image_size", "final_ln_after_pool"}
_IGNORED = {
    "patch_dropout", "norm_kwargs", "output_tokens", "pos_embed_type", "no_ln_pre", "attn_pooler_queries", "attn_pooler_heads",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
}  # fmt: skip
# Fields whose other values mean another network under the same keys, with the values that mean this one.
_FIXED: dict[str, tuple[Any, ...]] = {
    "pool_type": ("avg",),
    "attentional_pool": (False, None),
    "ls_init_value": (None,),
    "timm_model_name": (None, ""),
    "act_kwargs": (None, {}),
}


def load_vision_encoder(
    path: str | Path,
    *,
    latent_convention: str = "openvision3",
    final_ln_after_pool: bool | None = None,
    output_tokens: bool = True,
    embed_dim: int | None = None,
    vae: FrozenVAE | str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    image_size: int | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    latents: str | None = None,
) -> ViTEncoder:
    """A released vision tower in eval mode. Calling it, or `encode_latents`, takes latents [B, 16, H, W], `encode` takes images
    [B, 3, H, W] in [-1, 1]; both return (pooled [B, E], tokens [B, N, D]).

    path: a folder with open_clip_config.json and the weights (.safetensors or .bin), the weights file itself, or a hub id. What the
    release leaves open is an option:
        latent_convention      "openvision3", the authors' test script, or "flux" (`latents`, its former name, is deprecated)
        final_ln_after_pool    None: the config's word, else True (the norm on the pooled vector, raw tokens)
        output_tokens          False: pooled alone comes back (the config's word is not asked)
        embed_dim              None: the config's word, else the width of the projection in the file
        vae                    a FrozenVAE, its folder or hub id, or "small"; None: FLUX.1's, loaded when an image is first encoded
    dtype: default float32, "auto" the file's own. image_size: pixels, where other than the config's: `ViTEncoder.set_image_size`.
    variant: of the weights, "fp16" for model.fp16.safetensors. The rest is huggingface_hub's. The weights are in memory once.
    FileNotFoundError or ValueError, in one line, names what is missing or wrong. Unknown vision_cfg fields are warned of.
    """
    if latents is not None:
        warnings.warn("load_vision_encoder: latents is now named latent_convention", DeprecationWarning, stacklevel=2)
        latent_convention = latents
    check_convention(latent_convention)
    what = f"load_vision_encoder({str(path)!r})"
    wide = pretrained.as_dtype(dtype, what)
    device = pretrained.check_device(device, what)
    hub = pretrained.Hub(revision, token, cache_dir, local_files_only)
    found = pretrained.resolve(path, what, [CONFIG_FILE, *pretrained.weight_patterns(WEIGHT_FILES, variant)], hub)
    weights = found if found.is_file() else pretrained.find_weights(found, WEIGHT_FILES, what, variant)
    values = pretrained.read_json(weights.parent / CONFIG_FILE, what)
    state = released_state(pretrained.read_tensors(weights, what, wide), what)
    config = vision_config_of(values, state, what, final_ln_after_pool, embed_dim)
    encoder = from_released_state_dict(
        state, config, latent_convention=latent_convention, output_tokens=output_tokens, what=what, dtype=wide, owned=True
    )
    if image_size is not None:
        encoder.set_image_size(image_size)
    if isinstance(vae, FrozenVAE):
        encoder.set_vae(vae)
    else:
        encoder.vae_source = (str(vae or DEFAULT_VAE), None)
        encoder.vae_hub = pretrained.Hub(None, token, cache_dir, local_files_only)
    return encoder.to(device).eval()


def save_vision_encoder(
    encoder: ViTEncoder,
    path: str | Path,
    *,
    weights: str = "open_clip_model.safetensors",
    prefix: str = "visual.",
    former: tuple[str, ...] = (),
) -> None:
    """Writes the released layout to the folder `path`, all or nothing: open_clip_config.json and `weights`, one of WEIGHT_FILES.

    The keys, their order and the tensors' bytes are those that `load_vision_encoder(..., dtype="auto")` read. prefix: before each key; the
    released files come with "visual." and without. former: other files of a former save that may go.
    """
    if weights not in WEIGHT_FILES:
        raise ValueError(f"save_vision_encoder: weights must be one of {', '.join(WEIGHT_FILES)}; got {weights!r}")
    with atomic_folder(path, former=(*WEIGHT_FILES, *former)) as folder:
        text = json.dumps(released_config(encoder.config), indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        pretrained.write_tensors(to_released_state_dict(encoder, prefix), folder / weights)


def released_config(config: VisionConfig) -> dict[str, Any]:
    """VisionConfig -> what open_clip_config.json says of it: the inverse of `vision_config_of`."""
    vision = {
        "image_size": config.image_size // VAE_STRIDE,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "layers": config.depth,
        "width": config.width,
        "head_width": config.width // config.heads,
        "mlp_ratio": config.mlp_dim / config.width,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": config.final_ln_after_pool,
        "output_tokens": True,
        "norm_kwargs": {"eps": 1e-6},
    }
    return {
        "model_cfg": {"embed_dim": config.embed_dim, "vision_cfg": vision},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }


def released_state(state: Mapping[str, Any], what: str = "state dict") -> dict[str, Tensor]:
    """Unwraps a nested "state_dict", strips "module." and, where one key has it, keeps only what is under "visual."."""
    while isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    tensors = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("visual.") for key in tensors):
        tensors = {key.removeprefix("visual."): v for key, v in tensors.items() if key.startswith("visual.")}
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{what}: {key!r} is no tensor but {type(value).__name__}; give a state dict of the vision tower")
    return tensors


def vision_config_of(
    values: Mapping[str, Any],
    state: Mapping[str, Tensor],
    what: str = CONFIG_FILE,
    final_ln_after_pool: bool | None = None,
    embed_dim: int | None = None,
) -> VisionConfig:
    """open_clip_config.json -> VisionConfig. text_cfg, preprocess_cfg and custom_text may be there or not."""
    model = values.get("model_cfg", values)
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(vision, Mapping):
        raise ValueError(f"{what}: {CONFIG_FILE} has no vision_cfg")
    unknown = sorted(set(vision) - _READ - _IGNORED - set(_FIXED))
    if unknown:
        warnings.warn(f"{what}: {CONFIG_FILE} has unknown vision_cfg fields, not used: {', '.join(unknown)}", stacklevel=3)
    for key, allowed in _FIXED.items():
        if key in vision and vision[key] not in allowed:
            raise ValueError(f"{what}: {CONFIG_FILE} has vision_cfg.{key} = {vision[key]!r}; only {allowed[0]!r} is supported")

    def number(key: str, default: float) -> float:
        value = vision.get(key, default)
        if not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{what}: {CONFIG_FILE} has vision_cfg.{key} = {value!r}; it takes a positive number")
        return value

    width = int(number("width", 768))
    if embed_dim is None:
        embed_dim = model.get("embed_dim") or (state["proj"].shape[1] if "proj" in state else width)
    if final_ln_after_pool is None:
        final_ln_after_pool = bool(vision.get("final_ln_after_pool", True))
    return VisionConfig(
        width=width,
        depth=int(number("layers", 12)),
        heads=width // int(number("head_width", 64)),
        # A ratio of whole numbers comes back as one: 4304 / 1152 * 1152 is 4304.0000000000005.
        mlp_dim=int(width * number("mlp_ratio", 4.0) + 1e-6),
        patch_size=int(number("patch_size", 2)),
        in_channels=int(number("in_channels", 16)),
        image_size=int(number("image_size", 32)) * VAE_STRIDE,
        embed_dim=int(embed_dim),
        final_ln_after_pool=final_ln_after_pool,
    )


def from_released_state_dict(
    state: Mapping[str, Tensor],
    config: VisionConfig,
    *,
    latent_convention: str = "openvision3",
    output_tokens: bool = True,
    what: str = "state dict",
    dtype: torch.dtype | None = torch.float32,
    owned: bool = False,
) -> ViTEncoder:
    """A ViTEncoder with the tensors of a released state dict, the position embedding among them. ValueError names a wrong key.

    dtype: of the encoder; None is that of each tensor. owned: the tensors may become the encoder's parameters, without a copy.
    """
    with pretrained.without_values():
        encoder = ViTEncoder(config, latent_convention)
    encoder.output_tokens = output_tokens
    hint = f" ({CONFIG_FILE} says width {config.width}, {config.depth} layers, image_size {config.image_size // VAE_STRIDE})"
    try:
        pretrained.check_state(to_released_state_dict(encoder), state, what)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    renamed = {ours: state[theirs].detach().to(dtype=dtype, copy=not owned) for ours, theirs in _keys(config)}
    renamed["patch_embed.weight"] = renamed["patch_embed.weight"].flatten(1)
    renamed["head.weight"] = renamed["head.weight"].t()
    encoder.load_state_dict({key: value.contiguous() for key, value in renamed.items()}, assign=True)
    return encoder


def to_released_state_dict(encoder: ViTEncoder, prefix: str = "") -> dict[str, Tensor]:
    """The released layout, keys in its order; `prefix` is put before each, e.g. "visual."."""
    config = encoder.config
    ours = dict(encoder.state_dict())
    ours["pos_embed"] = encoder.position_embedding((config.grid, config.grid))
    ours["patch_embed.weight"] = ours["patch_embed.weight"].unflatten(
        1, (config.in_channels, config.patch_size, config.patch_size)
    )
    ours["head.weight"] = ours["head.weight"].t().contiguous()
    return {prefix + theirs: ours[key] for key, theirs in _keys(config)}


def _keys(config: VisionConfig) -> list[tuple[str, str]]:
    """(ours, theirs) in the order of the released files."""
    head = [
        ("cls_token", "class_embedding"),
        ("pos_embed", "positional_embedding"),
        ("head.weight", "proj"),
        ("patch_embed.weight", "conv1.weight"),
    ]
    blocks = [
        (f"transformer.blocks.{i}.{ours}", f"transformer.resblocks.{i}.{theirs}")
        for i in range(config.depth)
        for ours, theirs in _BLOCK_KEYS.items()
    ]
    return [*head, *blocks, ("norm.weight", "ln_post.weight"), ("norm.bias", "ln_post.bias")]
