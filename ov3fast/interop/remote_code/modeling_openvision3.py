"""OpenVision 3's vision and text towers as transformers models.

With ov3fast installed the layers run on its operators, without it on plain PyTorch; the weights and the outputs are the same.

Legend: B batch, N patch tokens, L ids, D width, H heads, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_openvision3 import OpenVision3Config, OpenVision3TextConfig, OpenVision3VisionConfig

try:
    from ov3fast import ops
    from ov3fast.models.group_norm_silu import fuse_group_norm_silu
except ImportError:
    ops: Any = None  # type: ignore[no-redef]


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """norm(x), or (norm(x + residual), x + residual)."""
        if ops is not None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual)
        if residual is None:
            return super().forward(x)
        return super().forward(x + residual), x + residual


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if ops is None else ops.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        if ops is not None:
            out = ops.flash_attention_qkvpacked(qkv)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(out.reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if ops is None:
            return self.fc2(F.gelu(self.fc1(x), approximate=self.activation))
        activation = "gelu" if self.activation == "none" else "gelu_tanh"
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, activation=activation)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); it takes and returns (x, the last branch, still to be added to x)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = Attention(config.hidden_size, config.num_attention_heads)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, x = (self.norm1(x), x) if branch is None else self.norm1(branch, residual=x)
        normed, x = self.norm2(self.attn(normed), residual=x)
        return x, self.mlp(normed)


class Transformer(nn.Module):
    """The blocks; `forward` gives the residual stream before each of them and after the last."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any

    def forward(self, x: Tensor, all_states: bool) -> list[Tensor]:
        branch, states = None, []
        for block in self.blocks:
            if all_states:
                states.append(x if branch is None else x + branch)
            if self.gradient_checkpointing and self.training:
                x, branch = self._gradient_checkpointing_func(block.__call__, x, branch)
            else:
                x, branch = block(x, branch)
        return [*states, x if branch is None else x + branch]


def sincos2d(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed position embedding [grid_h * grid_w, width], row by row; omega_i = 10000^(-i / (width / 4 - 1)), [sin x, cos x, sin y, cos y]."""
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / (quarter - 1))
    y, x = (torch.arange(side, dtype=torch.float64, device="cpu") for side in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


class OpenVision3PreTrainedModel(PreTrainedModel):
    config_class: Any = OpenVision3Config
    base_model_prefix = "openvision3"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    # An autoencoder in half precision would change the tokens.
    _keep_in_fp32_modules_strict = ["vae"]

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            bias: Any = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, OpenVision3VisionModel):
            nn.init.constant_(module.cls_token, 0.0)
            if module.pos_embed is not None:
                nn.init.normal_(module.pos_embed, std=std)
        elif isinstance(module, OpenVision3TextModel):
            nn.init.normal_(module.pos_embed, std=std)
        elif isinstance(module, OpenVision3Model):
            nn.init.constant_(module.logit_scale, module.config.logit_scale_init_value)
            if module.logit_bias is not None:
                nn.init.constant_(module.logit_bias, -10.0)


class OpenVision3VisionModel(OpenVision3PreTrainedModel):
    """Images or latents -> tokens, without the CLS token: hidden_states and last_hidden_state are [B, N, D], pooler_output [B, E].

    In transformers' Llava classes: vision_feature_select_strategy="full", for "default" would drop a patch.
    """

    config_class = OpenVision3VisionConfig

    def __init__(self, config: OpenVision3VisionConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.latent_patch_size
        self.patch_embed = nn.Linear(config.latent_channels * patch**2, width, bias=False)
        self.cls_token: Any = nn.Parameter(torch.zeros(width))
        self.pos_embed: nn.Parameter | None
        self.transformer = Transformer(config)
        self.norm = LayerNorm(width, config.layer_norm_eps)
        self.head = Linear(width, config.projection_dim, bias=False)
        side = config.image_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1 + side * side, width)) if config.learned_positions else None
        self.vae = None
        if config.vae_config is not None:
            from diffusers import AutoencoderKL

            self.vae = AutoencoderKL.from_config(config.vae_config).requires_grad_(False).eval()
            self.vae.decoder = None
            if ops is not None:
                fuse_group_norm_silu(self.vae)
        self.post_init()

    @property
    def patch_size(self) -> int:
        """Pixels per token side."""
        return self.config.patch_size

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    def forward(
        self,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        output_hidden_states: Any = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """pixel_values [B, 3, H, W] in [-1, 1], or latents [B, C, h, w] already shifted and scaled.

        interpolate_pos_encoding: sides other than config.image_size are taken. ValueError otherwise, or where both inputs or neither are given.
        """
        if (pixel_values is None) == (latents is None):
            raise ValueError("OpenVision3VisionModel: give pixel_values or latents, one of them")
        inputs: Any = self._moments(pixel_values) if latents is None else latents
        patch = self.config.latent_patch_size
        grid = (inputs.shape[2] // patch, inputs.shape[3] // patch)
        side = self.config.image_size // self.config.patch_size
        if grid != (side, side) and not interpolate_pos_encoding:
            height, width = (n * self.config.patch_size for n in grid)
            raise ValueError(
                f"OpenVision3VisionModel: images must be {self.config.image_size} x {self.config.image_size} pixels, got "
                f"{height} x {width}; interpolate_pos_encoding=True takes other sizes"
            )
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        # transformers' Llava classes name the layers that they want, and 0 is one.
        all_states = output_hidden_states is not None and output_hidden_states is not False
        x = self._embed(inputs, grid, moments=latents is None)
        states = [state[:, 1:] for state in self.transformer(x, all_states)]
        tokens = states[-1]
        if self.config.final_ln_after_pool:
            pooled = self.head(self.norm(tokens.mean(1)))
            tokens = self.norm(tokens) if self.config.post_ln else tokens
        else:
            tokens = self.norm(tokens)
            pooled = self.head(tokens.mean(1))
        states[-1] = tokens
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=pooled, hidden_states=tuple(states) if all_states else None
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def _moments(self, pixel_values: Any) -> Tensor:
        if self.vae is None:
            raise ValueError("OpenVision3VisionModel: the config has no vae_config, so it takes latents, not pixel_values")
        size = self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or pixel_values.shape[2] % size or pixel_values.shape[3] % size:
            raise ValueError(
                f"OpenVision3VisionModel: pixel_values must be [B, 3, H, W] with sides that are multiples of {size}, "
                f"got {tuple(pixel_values.shape)}"
            )
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.vae.encode(pixel_values.to(next(self.vae.parameters()).dtype)).latent_dist.parameters

    def _embed(self, inputs: Tensor, grid: tuple[int, int], moments: bool) -> Tensor:
        config = self.config
        scale, shift = (config.latent_scale, config.latent_shift) if moments else (1.0, 0.0)
        weight, patch = self.patch_embed.weight, config.latent_patch_size
        if inputs.dtype not in (weight.dtype, torch.float32):
            inputs = inputs.to(weight.dtype)
        positions = self._positions(grid)
        if ops is not None:
            return ops.patch_embed(
                inputs, weight, None, positions, self.cls_token, patch_size=patch, scale=scale, shift=shift, moments=moments
            )
        z = inputs.chunk(2, dim=1)[0] if moments else inputs
        z = ((z - shift) * scale).to(weight.dtype)
        x = F.conv2d(z, weight.unflatten(1, (-1, patch, patch)), stride=patch).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + positions

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        config, side = self.config, self.config.image_size // self.config.patch_size
        if self.pos_embed is None:
            table = sincos2d(grid, config.hidden_size)
            return torch.cat([table.new_zeros(1, config.hidden_size), table]).to(self.cls_token)
        if grid == (side, side):
            return self.pos_embed
        own = self.pos_embed[1:].float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
        resized = F.interpolate(own, grid, mode="bicubic", antialias=False)[0].flatten(1).t()
        return torch.cat([self.pos_embed[:1], resized.to(self.pos_embed)])


class OpenVision3TextModel(OpenVision3PreTrainedModel):
    """Ids [B, L] -> last_hidden_state [B, L, D] (normed), pooler_output [B, E]. Padding is not masked, as in the official code."""

    config_class = OpenVision3TextConfig
    main_input_name = "input_ids"

    def __init__(self, config: OpenVision3TextConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))
        self.transformer = Transformer(config)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.embed = value

    def forward(
        self, input_ids: Tensor, output_hidden_states: Any = None, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        x = self.embed(input_ids) + self.pos_embed[: input_ids.shape[1]]
        all_states = output_hidden_states is not None and output_hidden_states is not False
        states = self.transformer(x, all_states)
        tokens = self.norm(states[-1])
        pool = self.config.pool
        pooled = self.head(tokens.mean(1) if pool == "mean" else tokens[:, 0 if pool == "first" else -1])
        states[-1] = tokens
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=pooled, hidden_states=tuple(states) if all_states else None
        )
        return output.to_tuple() if return_dict is False else output


@dataclass
class OpenVision3Output(ModelOutput):
    """Embeddings are normalised [B, E]; logits_per_image [images, texts]."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


class OpenVision3Model(OpenVision3PreTrainedModel):
    """Both towers: `get_image_features`, `get_text_features`, and the logits of images against texts."""

    def __init__(self, config: OpenVision3Config) -> None:
        super().__init__(config)
        self.vision_model = OpenVision3VisionModel(config.vision_config)
        self.text_model = OpenVision3TextModel(config.text_config)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.sigmoid else None
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The vision tower's output; its pooler_output [B, E] is the feature, not normalised (as in transformers' CLIP)."""
        return self.vision_model(pixel_values=pixel_values, **{**kwargs, "return_dict": True})

    def get_text_features(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The text tower's output; its pooler_output [B, E] is the feature, not normalised."""
        return self.text_model(input_ids=input_ids, **{**kwargs, "return_dict": True})

    def forward(self, input_ids: Tensor, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any) -> Any:
        vision = self.get_image_features(pixel_values, **kwargs)
        text = self.get_text_features(input_ids, **kwargs)
        image_embeds = F.normalize(vision.pooler_output.float(), dim=-1)
        text_embeds = F.normalize(text.pooler_output.float(), dim=-1)
        logits = self.logit_scale.exp() * text_embeds @ image_embeds.t()
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        output = OpenVision3Output(logits.t(), logits, text_embeds, image_embeds, text, vision)
        return output.to_tuple() if return_dict is False else output


__all__ = ["OpenVision3Model", "OpenVision3PreTrainedModel", "OpenVision3TextModel", "OpenVision3VisionModel"]
