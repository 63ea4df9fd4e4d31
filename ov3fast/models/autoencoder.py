"""The convolutional autoencoder of Stable Diffusion and FLUX.1: diffusers' AutoencoderKL, without the import of diffusers.

Parameters have diffusers' names and `encode` and `decode` return what diffusers' do, so a folder that one writes the other reads, with
the same bits out of the same weights (GroupNorm and SiLU fused on both sides). Layouts other than residual blocks around one attention
block are left to diffusers: `supports` tells them apart.

Source: Rombach et al. 2021 (arXiv 2112.10752), appendix G.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast.io import atomic_write
from ov3fast.models import pretrained
from ov3fast.models.group_norm_silu import GroupNormSiLU

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The attention's layers in files written before diffusers 0.12."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """config.json of an AutoencoderKL; the defaults are diffusers'."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AutoencoderConfig:
        """Names with an underscore in front (_class_name, _diffusers_version) are left out. TypeError for an unknown name."""
        fields: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if not name.startswith("_")
        }
        return cls(**fields)


def supports(config: Mapping[str, Any]) -> bool:
    """Whether Autoencoder computes what diffusers does for this config.json."""
    known = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    if any(name not in known and not name.startswith("_") for name in config):
        return False
    read = AutoencoderConfig.from_json(config)
    return (
        config.get("_class_name", "AutoencoderKL") == "AutoencoderKL"
        and set(read.down_block_types) == {"DownEncoderBlock2D"}
        and set(read.up_block_types) == {"UpDecoderBlock2D"}
        and len(read.down_block_types) == len(read.up_block_types) == len(read.block_out_channels)
        and read.act_fn == "silu"
    )


class Posterior(NamedTuple):
    """parameters [B, 2C, h, w]: the mean and the log-variance of a diagonal Gaussian."""

    parameters: Tensor

    @property
    def mean(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[0]

    @property
    def logvar(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[1].clamp(-30.0, 20.0)


class Encoded(NamedTuple):
    latent_dist: Posterior


class Decoded(NamedTuple):
    sample: Tensor


class Autoencoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, C, H / stride, W / stride], stride 2^(number of blocks - 1)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, images: Tensor) -> Encoded:
        return Encoded(Posterior(self.quant_conv(self.encoder(images))))

    def decode(self, z: Tensor) -> Decoded:
        return Decoded(self.decoder(self.post_quant_conv(z)))

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Autoencoder:
        """ValueError or FileNotFoundError where the weights are missing, unreadable, or don't fit the config."""
        config = AutoencoderConfig.from_json(pretrained.read_json(folder / CONFIG_FILE, "its config"))
        weights = pretrained.find_weights(folder, WEIGHT_FILES, "its weights", variant)
        state = pretrained.read_tensors(weights, "its weights", dtype)
        with pretrained.without_values():
            vae = cls(config)
        pretrained.load_state(vae, {_current(name): value for name, value in state.items()}, "its weights", assign=True)
        return vae

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that diffusers reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / WEIGHT_FILES[0]) as file:
            pretrained.write_tensors(self.state_dict(), file)
        config = {"_class_name": "AutoencoderKL", **dataclasses.asdict(self.config)}
        with atomic_write(folder / CONFIG_FILE) as file:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(into, out, config.layers_per_block, groups, last=number == len(widths) - 1)
            for number, (into, out) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = _norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(self.conv_norm_out(self.mid_block(x)))
        return x


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(into, out, config.layers_per_block + 1, groups, last=number == len(widths) - 1)
            for number, (into, out) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = _norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        x = self.conv_out(self.conv_norm_out(x))
        return x


class DownBlock(nn.Module):
    def __init__(self, into: int, out: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(into if layer == 0 else out, out, groups) for layer in range(layers))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, into: int, out: int, layers: int, groups: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(into if layer == 0 else out, out, groups) for layer in range(layers))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        first = ResnetBlock(channels, channels, groups)
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([first, ResnetBlock(channels, channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        x = self.resnets[1](x)
        return x


class ResnetBlock(nn.Module):
    def __init__(self, into: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(groups, into)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.norm2 = _norm(groups, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(into, out, 1) if into != out else None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Self-attention over the pixels, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (linear(h).unsqueeze(1) for linear in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return h.transpose(1, 2).reshape(x.shape) + x


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.pad(x, (0, 1, 0, 1)))
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if 4 * x.numel() >= 2**31:  # PyTorch's channels-last kernel counts elements in 32 bits
            x = x.contiguous()
        x = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def _norm(groups: int, channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(nn.GroupNorm(groups, channels, eps=1e-6))


def _current(name: str) -> str:
    """A parameter's name today; only the attention's have changed."""
    head, _, layer = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    if "attentions" not in head or layer not in FORMER_NAMES:
        return name
    return f"{head}.{FORMER_NAMES[layer]}.{name.rpartition('.')[2]}"
