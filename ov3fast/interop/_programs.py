"""A model's parts as torch.export programs of plain PyTorch: what `ov3fast export torch|onnx|openvino` start from.

    image        images [B, 3, H, W] in [-1, 1] -> pooled [B, E], tokens [B, N, D]
    reconstruct  images [B, 3, H, W] in [-1, 1] -> images [B, 3, H, W], clamped to [-1, 1]
    text         ids [B, L] int64 -> feature [B, E]

The operators are decomposed into PyTorch's own, so that a program needs no ov3fast where it runs. The batch is free, and so are the sides of
images, in steps of 16 pixels, where the position embedding is the formula's: a table that came with the weights serves one size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ov3fast.interop._tower import Model, encoder_of
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import from_latents
from ov3fast.ops.flash_attention import reference as attention_reference
from ov3fast.ops.latent_projection import reference as projection_reference
from ov3fast.ops.patch_embed import reference as embed_reference

LARGEST_BATCH, LARGEST_SIDE = 4096, 4096
"""Where a program's range of sizes ends; the side in pixels."""


class Image(nn.Module):
    """Images -> (pooled, tokens)."""

    inputs, outputs = ("images",), ("pooled", "tokens")

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder: Any = encoder_of(model)
        # Within the encoder it is no submodule.
        self.vae: Any = self.encoder.get_vae().vae
        self.scale, self.shift = self.encoder.get_vae().scale_and_shift(self.encoder.latent_convention)
        self.post_ln = isinstance(model, OpenVision3) and model.config.tokens == "post_ln"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.vae.encode(images.to(self.encoder.get_vae().dtype)).latent_dist.parameters
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        return self.encoder(moments, moments=True, scale=self.scale, shift=self.shift, post_ln=self.post_ln)


class Reconstruct(nn.Module):
    """Images -> their reconstruction, without noise."""

    inputs, outputs = ("images",), ("reconstruction",)

    def __init__(self, model: OpenVision3) -> None:
        super().__init__()
        self.image, self.decoder = Image(model), model.decoder
        self.stride = VAE_STRIDE * model.config.vision.patch_size
        self.convention = model.config.latent_convention

    def forward(self, images: Tensor) -> Tensor:
        _, tokens = self.image(images)
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        latents = self.decoder(tokens, grid)
        vae = self.image.encoder.get_vae()
        z = from_latents(latents.to(vae.dtype), self.convention, vae.scaling_factor, vae.shift_factor)
        return self.image.vae.decode(z).sample.clamp(-1, 1)


class Text(nn.Module):
    """Ids -> feature."""

    inputs, outputs = ("ids",), ("feature",)

    def __init__(self, model: OpenVision3) -> None:
        super().__init__()
        self.text = model.text

    def forward(self, ids: Tensor) -> Tensor:
        return self.text(ids)


@dataclass(frozen=True)
class Part:
    """One program to be: `module` maps `example` to its outputs, and the axes named in `free` may have other sizes."""

    name: str
    module: Any
    example: Tensor
    free: dict[int, Any]

    @property
    def free_names(self) -> list[str]:
        names = ("batch", "channels", "height", "width") if self.example.is_floating_point() else ("batch", "length")
        return [names[axis] for axis in sorted(self.free)]


def parts_of(model: Model) -> list[Part]:
    """What of a model is exported: a released tower has the first part only."""
    encoder = encoder_of(model)
    config = encoder.config
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    free: dict[int, Any] = {0: batch}
    if encoder.pos_embed is None:
        stride = VAE_STRIDE * config.patch_size
        free |= {2: stride * Dim("rows", min=2, max=LARGEST_SIDE // stride)}
        free |= {3: stride * Dim("columns", min=2, max=LARGEST_SIDE // stride)}
    # Sides that differ, so that no two axes are taken for one.
    height, width = (48, 80) if len(free) > 1 else (config.image_size, config.image_size)
    images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(encoder.device, encoder.cls_token.dtype)
    parts = [Part("image", Image(model), images, free)]
    if isinstance(model, OpenVision3):
        ids = torch.zeros(3, model.config.text.context_length, dtype=torch.int64, device=encoder.device)
        parts += [Part("reconstruct", Reconstruct(model), images, free), Part("text", Text(model), ids, {0: batch})]
    return parts


def program(part: Part) -> ExportedProgram:
    """The part as a program of aten operators."""
    with torch.no_grad():
        exported = torch.export.export(part.module.eval(), (part.example,), dynamic_shapes=(part.free,), strict=False)
        return exported.run_decompositions(decompositions())


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator of ov3fast -> the same by PyTorch's operators. What only a backward reads is left unset."""
    ops = torch.ops.ov3fast
    return {
        ops.linear.default: lambda x, weight, bias, impl: _linear(x, weight, bias),
        ops.layer_norm.default: _layer_norm,
        ops.mlp.default: _mlp,
        ops.flash_attention.default: lambda q, k, v, *options: _attention(q, k, v, *options),
        ops.flash_attention_qkvpacked.default: lambda qkv, *options: _attention(*qkv.unbind(2), *options),
        ops.patch_embed.default: _patch_embed,
        ops.latent_projection.default: lambda tokens, weight, bias, patch, h, w, impl: projection_reference(
            tokens, weight, bias, patch_size=patch, grid=(h, w)
        ),
        ops.group_norm_silu.default: _group_norm_silu,
    }


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, impl: str
) -> tuple[Tensor, ...]:
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), None if bias is None else bias.to(h.dtype), eps)
    return y, x.new_empty(0) if residual is None else h, *(x.new_empty(x.shape[:-1]) for _ in range(2))


def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, impl: str
) -> tuple[Tensor, Tensor]:
    h = _linear(x, w1, b1)
    return _linear(F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none"), w2, b2), h


def _attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix_len: int, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    if causal:
        out = attention_reference(q, k, v, causal=causal, prefix_len=prefix_len, scale=scale)
    else:
        q_BHND, k_BHND, v_BHND = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, scale=scale).transpose(1, 2)
    return out.contiguous(), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


def _patch_embed(
    latents: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None, cls: Tensor | None, rng: Tensor | None,
    patch_size: int, scale: float, shift: float, moments: bool, impl: str,
) -> Tensor:  # fmt: skip
    return embed_reference(
        latents, weight, bias, positions, cls,
        patch_size=patch_size, scale=scale, shift=shift, moments=moments, rng=rng,
    )  # fmt: skip


def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.silu(F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps))
    return y, x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)
