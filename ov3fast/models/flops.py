"""Counts without weights: FLOPs per image and parameters of every part.

A product of [m, k] and [k, n] matrices counts 2 m k n; norms, activations, softmax and additions count nothing. The towers are counted
by formula, the VAE by torch's FlopCounterMode on the meta device. Numbers are for one forward pass of one image (or text); a backward
pass costs twice as much again.

Legend: N tokens, D width, M mlp width, L layers, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .config import VAE_STRIDE, CaptionConfig, OpenVision3Config, TextConfig, VisionConfig
from .openvision3 import OpenVision3
from .perceptual import LPIPS
from .pixels import PIXELS
from .vae import FLUX_VAE, SMALL, FrozenVAE, small_vae_folder


def flops_per_image(
    config: OpenVision3Config,
    image_size: int | None = None,
    *,
    text_length: int | None = None,
    caption_length: int | None = None,
    vae_config: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Part -> forward FLOPs of one image of image_size pixels, one text and one caption (the config's sizes where None).

    vae_config: an AutoencoderKL's config; None takes the package's small one for config.vae "small", else FLUX.1-dev's.
    """
    size = config.vision.image_size if image_size is None else image_size
    stride = VAE_STRIDE * config.vision.patch_size
    if size < stride or size % stride:
        raise ValueError(f"flops_per_image: image_size must be a multiple of {stride} pixels, got {size}")
    tokens = (size // stride) ** 2
    text = config.text.context_length if text_length is None else text_length
    caption = config.caption.length if caption_length is None else caption_length
    without = config.vae == PIXELS and vae_config is None
    vae_encoder, vae_decoder = (0.0, 0.0) if without else vae_flops(resolve_vae_config(config, vae_config), size)
    return {
        "vae_encoder": vae_encoder,
        "encoder": encoder_flops(config.vision, tokens),
        "decoder": decoder_flops(config, tokens),
        "vae_decoder": vae_decoder,
        "text": text_flops(config.text, text, config.vision.embed_dim),
        "captioner": caption_flops(config.caption, tokens, caption, config.vision.width, text, config.text.width),
    }


def parameter_counts(config: OpenVision3Config, vae_config: dict[str, Any] | None = None) -> dict[str, int]:
    """Part -> number of parameters, as OpenVision3.parameter_counts, without allocating any."""
    with torch.device("meta"):
        model = OpenVision3(config)
        if config.vae == PIXELS and vae_config is None:
            return {**model.parameter_counts(), "vae": 0}
        vae = FrozenVAE.from_config(resolve_vae_config(config, vae_config))
    return {**model.parameter_counts(), "vae": sum(p.numel() for p in vae.parameters())}


def resolve_vae_config(config: OpenVision3Config, vae_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The VAE architecture to count: the given one, the small one's, that of a local folder, or FLUX.1-dev's."""
    from .pretrained import read_json

    if vae_config is not None:
        return vae_config
    if config.vae == SMALL:
        return read_json(small_vae_folder() / "config.json", "small VAE")
    local = Path(config.vae, config.vae_subfolder or "", "config.json")
    return read_json(local, "VAE") if local.is_file() else FLUX_VAE


def vae_flops(vae_config: dict[str, Any], image_size: int) -> tuple[float, float]:
    """(encoder, decoder) FLOPs of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        vae = FrozenVAE.from_config(vae_config).vae
        with FlopCounterMode(display=False) as encoder:
            z = vae.encode(torch.empty(1, 3, image_size, image_size)).latent_dist.mean
        with FlopCounterMode(display=False) as decoder:
            vae.decode(z)
    return float(encoder.get_total_flops()), float(decoder.get_total_flops())


def lpips_flops(backbone: str, image_size: int) -> float:
    """LPIPS' forward FLOPs of one image of a pair."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        lpips, image = LPIPS(backbone), torch.empty(1, 3, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            lpips(image, image)
    return float(counter.get_total_flops()) / 2


def blocks_flops(tokens: int, width: int, depth: int, mlp_dim: int, pairs: int | None = None) -> float:
    """L blocks: 8 N D^2 for qkv and the output projection, 4 D per query-key pair, 4 N D M for the MLP.

    pairs: query-key pairs that attention computes; None is all N^2.
    """
    pairs = tokens * tokens if pairs is None else pairs
    return float(depth * (8 * tokens * width**2 + 4 * pairs * width + 4 * tokens * width * mlp_dim))


def mlp_flops_per_image(config: OpenVision3Config, image_size: int) -> dict[str, float]:
    """Tower -> the part of its forward FLOPs that its MLPs take."""
    tokens = (image_size // (VAE_STRIDE * config.vision.patch_size)) ** 2
    caption = config.caption
    prefix = max(1, int(tokens * caption.visual_keep)) + (config.text.context_length if caption.text_prefix else 0)
    towers: dict[str, tuple[Any, int]] = {
        "encoder": (config.vision, tokens + 1),
        "decoder": (config.decoder, tokens),
        "text": (config.text, config.text.context_length),
        "captioner": (caption, prefix + caption.length - 1),
    }
    return {name: 4.0 * length * part.depth * part.width * part.mlp_dim for name, (part, length) in towers.items()}


def encoder_flops(config: VisionConfig, tokens: int) -> float:
    """The ViT encoder on `tokens` patch tokens and the CLS token."""
    embed = 2 * tokens * config.in_channels * config.patch_size**2 * config.width
    blocks = blocks_flops(tokens + 1, config.width, config.depth, config.mlp_dim)
    return embed + blocks + 2 * config.width * config.embed_dim


def decoder_flops(config: OpenVision3Config, tokens: int) -> float:
    """The ViT decoder from tokens to latents."""
    decoder, vision = config.decoder, config.vision
    embed = 2 * tokens * vision.width * decoder.width
    head = 2 * tokens * decoder.width * vision.in_channels * vision.patch_size**2
    return embed + blocks_flops(tokens, decoder.width, decoder.depth, decoder.mlp_dim) + head


def text_flops(config: TextConfig, length: int, embed_dim: int) -> float:
    """The text encoder on `length` ids."""
    return blocks_flops(length, config.width, config.depth, config.mlp_dim) + 2 * config.width * embed_dim


def caption_flops(
    config: CaptionConfig, tokens: int, length: int, token_dim: int, text_length: int = 0, text_dim: int = 0
) -> float:
    """The caption decoder on `tokens` image tokens and `length` caption ids, the vocabulary head included.

    The visual_keep share of the tokens counts; of the causal part only the pairs that the mask leaves.
    """
    seen = max(1, int(tokens * config.visual_keep))
    project = 2 * seen * token_dim * config.width
    prefix = seen
    if config.text_prefix:
        project += 2 * text_length * text_dim * config.width
        prefix += text_length
    targets = length - 1
    pairs = prefix * prefix + targets * prefix + targets * (targets + 1) // 2
    blocks = blocks_flops(prefix + targets, config.width, config.depth, config.mlp_dim, pairs)
    return project + blocks + 2 * targets * config.width * config.vocab_size
