"""The two vision towers: VAE latents or images -> tokens (ViTEncoder), tokens -> VAE latents (ViTDecoder).

Architecture: official repository UCSC-VLAA/OpenVision, src/models/vit.py, and the OpenVision 3 paper (arXiv 2601.15369), section 3.2.
Patch 2 on latents for the encoder, patch 1 (one token, one column) for the decoder; fixed 2-d sine-cosine positions; exact GELU;
LayerNorm eps 1e-6.

Legend: B batch, C latent channels, N = h * w tokens, D width, E embedding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.data.preprocess import as_images

from . import noise
from .config import DEFAULT_VAE, VAE_STRIDE, DecoderConfig, VisionConfig
from .pretrained import Hub
from .transformer import LayerNorm, Linear, Transformer, init_lecun, init_xavier
from .vae import FrozenVAE

if TYPE_CHECKING:
    from ov3fast.data.preprocess import ImageLike


def sincos2d(grid_h: int, grid_w: int, dim: int) -> Tensor:
    """Fixed position embedding [grid_h * grid_w, dim] float32, row by row, in MoCo v3's form.

    omega_i = 1 / 10000^(i / (dim / 4 - 1)), channels [sin x, cos x, sin y, cos y] (official src/models/vit.py,
    posemb_sincos_2d). It is not the MAE form, whose exponent is i / (dim / 4).
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"sincos2d: dim must be a multiple of 4 and at least 8, got {dim}")
    quarter = dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(torch.arange(grid_h, dtype=torch.float64), torch.arange(grid_w, dtype=torch.float64), indexing="ij")
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


class _Positions:
    """sincos2d per grid, device and dtype; not a module, so that it stays out of the state dict."""

    def __init__(self, dim: int, cls: bool) -> None:
        self.dim, self.cls = dim, cls
        self.known: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        # Under torch.compile the values become a constant of the graph, and a cache would only be a side effect.
        if torch.compiler.is_compiling():
            return self._make(grid, like)
        key = (*grid, like.device, like.dtype)
        if key not in self.known:
            self.known[key] = self._make(grid, like)
        return self.known[key]

    def _make(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        table = sincos2d(*grid, self.dim)
        if self.cls:
            table = torch.cat([table.new_zeros(1, self.dim), table])
        return table.to(device=like.device, dtype=like.dtype)


class ViTEncoder(nn.Module):
    """Latents [B, C, H, W] -> (pooled [B, E], tokens [B, N, D]), N = H / patch * W / patch, without the CLS token.

    Any size whose sides are multiples of the patch runs. `pos_embed` is sincos2d unless a released checkpoint brings its own.
    `latent_convention` is the one that the weights were trained on.

    Images go through an attached VAE (`set_vae`), which is no part of the parameters or the state dict: it is frozen and has its own
    file. Where none is attached, `vae_source`, (folder, hub id or "small"; subfolder), is loaded when an image is first encoded.
    """

    def __init__(self, config: VisionConfig, latent_convention: str = "openvision3") -> None:
        super().__init__()
        self.config = config
        self.latent_convention = latent_convention
        self.output_tokens = True
        self.vae_source: tuple[str, str | None] = (DEFAULT_VAE, None)
        self.vae_hub: Hub | None = None
        self.set_vae(None)
        width = config.width
        self.patch_embed = nn.Linear(config.in_channels * config.patch_size**2, width, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(width))
        self.transformer = Transformer(width, config.depth, config.heads, config.mlp_dim)
        self.norm = LayerNorm(width)
        self.head = Linear(width, config.embed_dim, bias=False)
        self.pos_embed: Tensor | None
        self.register_buffer("pos_embed", None)
        self._is_sincos = True
        self._positions = _Positions(width, cls=True)
        init_lecun(self.patch_embed)
        init_xavier(self.transformer, config.residual_init)
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def forward(
        self,
        latents: Tensor,
        *,
        moments: bool = False,
        rng: Tensor | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
        post_ln: bool = False,
        detach_pooled: bool = False,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """latents [B, C, H, W], already in the model's convention; or, with moments, [B, 2C, H, W] (mean, logvar).

        Moments are sampled with rng, or their mean taken, and z becomes (z - shift) * scale on the way in. post_ln norms the tokens
        that come out. detach_pooled: the gradient of pooled ends at its head. Returns pooled alone where `output_tokens` is False. ValueError for a wrong channel count or size.
        The input must be on the weights' device, in their dtype or float32; `encode_latents` and `encode_moments` cast.
        """
        grid = self._grid(latents, moments)
        x = ops.patch_embed(
            latents,
            self.patch_embed.weight,
            None,
            self.position_embedding(grid),
            self.cls_token,
            patch_size=self.config.patch_size,
            scale=scale,
            shift=shift,
            moments=moments,
            rng=rng,
        )
        if self.config.final_ln_after_pool:
            tokens = self.transformer(x)[:, 1:]
            mean = (tokens.detach() if detach_pooled else tokens).mean(1)
            pooled = self.head(self.norm(mean))
            tokens = self.norm(tokens) if post_ln else tokens
        else:
            tokens = self.transformer(x, self.norm)[:, 1:]
            pooled = self.head((tokens.detach() if detach_pooled else tokens).mean(1))
        return (pooled, tokens) if self.output_tokens else pooled

    def encode(
        self, images: Tensor | ImageLike, *, rng: Tensor | None = None, post_ln: bool = False
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Images [B, 3, H, W] in [-1, 1], on any device and of any floating dtype, or what `ov3fast.preprocess` takes (Pillow images,
        paths, uint8), at config.image_size -> what `forward` returns.

        The VAE's moments go straight into the patch embedding, which samples them with rng = (seed, offset), or takes their mean.
        ValueError for sides that are no multiples of 8 * patch_size and for floats in 0..255, TypeError for wider integers.
        """
        return self.encode_moments(self.encode_to_moments(as_images(images, self.config.image_size)), rng=rng, post_ln=post_ln)

    def encode_latents(self, latents: Tensor, *, post_ln: bool = False) -> tuple[Tensor, Tensor] | Tensor:
        """Latents [B, C, h, w] in the encoder's convention, on any device and of any floating dtype -> what `forward` returns."""
        outputs: tuple[Tensor, Tensor] | Tensor = self(self._cast(latents), post_ln=post_ln)
        return outputs

    def encode_moments(
        self, moments: Tensor, *, rng: Tensor | None = None, post_ln: bool = False
    ) -> tuple[Tensor, Tensor] | Tensor:
        """The VAE's moments [B, 2C, h, w] (mean and log-variance, before the latent convention) -> what `forward` returns."""
        scale, shift = self.get_vae().scale_and_shift(self.latent_convention)
        rng = None if rng is None else noise.derive_rng(rng, noise.POSTERIOR).to(self.device)
        latents = self._cast(moments)
        outputs: tuple[Tensor, Tensor] | Tensor = self(
            latents, moments=True, rng=rng, scale=scale, shift=shift, post_ln=post_ln
        )
        return outputs

    def encode_to_moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> the VAE's moments [B, 2C, h, w], in its dtype; no gradient."""
        stride = VAE_STRIDE * self.config.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(
                f"images: must be [B, 3, H, W] with sides that are multiples of {stride}, got {tuple(images.shape)}"
            )
        return self.get_vae().moments(images.to(self.device))

    @property
    def device(self) -> torch.device:
        return self.cls_token.device

    @property
    def vae(self) -> FrozenVAE | None:
        """The attached VAE, or None while there is none."""
        vae: FrozenVAE | None = self.__dict__["_vae"]
        return vae

    def set_vae(self, vae: FrozenVAE | None) -> None:
        """Attach a frozen VAE; raises ValueError if its channels, its stride or its latent convention differ."""
        if vae is not None:
            if vae.channels != self.config.in_channels:
                raise ValueError(f"vae: has {vae.channels} latent channels, the encoder takes {self.config.in_channels}")
            if vae.stride != VAE_STRIDE:
                raise ValueError(f"vae: must shrink images by {VAE_STRIDE}, this one shrinks by {vae.stride}")
            vae.latent_convention = vae.convention(self.latent_convention)
            vae.to(self.device)
        # Bypasses nn.Module's __setattr__, which would register it as a submodule.
        self.__dict__["_vae"] = vae

    def get_vae(self) -> FrozenVAE:
        """The attached VAE; `vae_source` is loaded on first need."""
        vae = self.vae
        if vae is None:
            vae = FrozenVAE.from_pretrained(*self.vae_source, hub=self.vae_hub)
            self.set_vae(vae)
        return vae

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """[1 + N, D] for a grid of tokens; the CLS row comes first and is zero. ValueError where only a checkpoint knows it."""
        own = self.config.grid
        if self.pos_embed is not None and grid == (own, own):
            return self.pos_embed
        if not self._is_sincos:
            raise ValueError(
                f"ViTEncoder: this checkpoint's position embedding is not sincos2d, so it serves {own}x{own} tokens only; "
                f"got {grid[0]}x{grid[1]}"
            )
        return self._positions(grid, self.cls_token)

    def set_position_embedding(self, values: Tensor) -> None:
        """Uses these values [1 + N, D] at config.image_size in place of the formula's; they then are in the state dict."""
        values = values.detach()
        # While weights are loaded into a module built on the meta device, the values come first.
        like = values if self.cls_token.is_meta else self.cls_token
        formula = self._positions((self.config.grid, self.config.grid), like)
        if values.shape != formula.shape:
            raise ValueError(f"ViTEncoder: pos_embed must be {tuple(formula.shape)}, got {tuple(values.shape)}")
        self.pos_embed = values.to(formula).contiguous().clone()
        rounding = max(1e-4, torch.finfo(formula.dtype).eps)
        self._is_sincos = formula.is_meta or bool((self.pos_embed - formula).abs().max() < rounding)

    def set_image_size(self, image_size: int) -> None:
        """Another config.image_size, in pixels. sincos2d is computed for its grid; a checkpoint's other embedding is resized (bicubic)."""
        former = self.config.grid
        config = dataclasses.replace(self.config, image_size=image_size)
        if self.pos_embed is not None and config.grid != former:
            if self._is_sincos:
                self.pos_embed = None
            else:
                grid = self.pos_embed[1:].float().unflatten(0, (former, former)).permute(2, 0, 1)[None]
                grid = nn.functional.interpolate(grid, (config.grid, config.grid), mode="bicubic", antialias=False)
                resized = torch.cat([self.pos_embed[:1], grid[0].flatten(1).t().to(self.pos_embed)])
                self.pos_embed = resized.contiguous()
        self.config = config

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> ViTEncoder:
        """A released vision tower: `ov3fast.load_vision_encoder`, with its options."""
        from .vision_tower import load_vision_encoder

        return load_vision_encoder(path, **options)

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Writes the released layout: `vision_tower.save_vision_encoder`, with its options."""
        from .vision_tower import save_vision_encoder

        save_vision_encoder(self, path, **options)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "pos_embed" in state_dict:
            self.set_position_embedding(state_dict[prefix + "pos_embed"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_activation_checkpointing(self, enabled: bool, recompute: str = "block") -> None:
        """Recompute each block, or its MLP alone (recompute="mlp"), in the backward pass in place of keeping its activations."""
        self.transformer.set_activation_checkpointing(enabled, recompute)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register the VAE as a submodule.
        if name == "vae":
            self.set_vae(value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> ViTEncoder:
        """Moves of the encoder take the VAE along; its dtype stays its own."""
        nn.Module._apply(self, fn, recurse)
        if self.vae is not None and self.device.type != "meta":
            self.vae.to(self.device)
        return self

    def _cast(self, values: Tensor) -> Tensor:
        """On the weights' device, in a dtype that the patch embedding takes: theirs, or float32, which it rounds itself."""
        if not values.is_floating_point():
            raise TypeError(f"latents: must be floating point, got {values.dtype}")
        own = self.cls_token.dtype
        return values.to(self.device, values.dtype if values.dtype in (own, torch.float32) else own)

    def _grid(self, latents: Tensor, moments: bool) -> tuple[int, int]:
        channels = self.config.in_channels * (2 if moments else 1)
        if latents.ndim != 4 or latents.shape[1] != channels:
            kind = "moments" if moments else "latents"
            raise ValueError(f"ViTEncoder: {kind} must be [B, {channels}, H, W], got {tuple(latents.shape)}")
        patch = self.config.patch_size
        height, width = latents.shape[2:]
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"ViTEncoder: the sides of the latents must be multiples of the patch {patch}, got {height}x{width}"
            )
        return height // patch, width // patch


class ViTDecoder(nn.Module):
    """Tokens [B, N, token_dim] -> latents [B, C, h * patch, w * patch]: the reconstruction branch up to the VAE decoder.

    Noise enters with the input projection (paper eq. 3); a linear head gives patch^2 * C values a token. The paper states neither
    position embedding nor final norm for it: sincos2d and a norm (`final_norm`) are used, no CLS token.
    """

    def __init__(self, config: DecoderConfig, token_dim: int, latent_channels: int = 16, patch_size: int = 2) -> None:
        super().__init__()
        self.config = config
        self.patch_size = patch_size
        self.embed = nn.Linear(token_dim, config.width)
        self.transformer = Transformer(config.width, config.depth, config.heads, config.mlp_dim)
        self.norm = LayerNorm(config.width) if config.final_norm else None
        self.head = nn.Linear(config.width, latent_channels * patch_size**2)
        self._positions = _Positions(config.width, cls=False)
        init_lecun(self.embed)
        init_xavier(self.transformer, config.residual_init)
        init_lecun(self.head)

    def forward(self, tokens: Tensor, grid: tuple[int, int], sigma: Tensor | None = None, rng: Tensor | None = None) -> Tensor:
        """tokens [B, h * w, token_dim], grid (h, w); sigma [B] with rng adds sigma_b * eps to the tokens, None adds nothing."""
        if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] or tokens.shape[2] != self.embed.in_features:
            raise ValueError(
                f"ViTDecoder: tokens must be [B, {grid[0]} * {grid[1]}, {self.embed.in_features}] for grid {tuple(grid)}, "
                f"got {tuple(tokens.shape)}"
            )
        if sigma is None:
            x = self.embed(tokens)
        elif rng is None:
            raise ValueError("ViTDecoder: sigma needs rng, the (seed, offset) tensor that the noise is drawn from")
        else:
            x = ops.noise_projection(tokens, sigma, self.embed.weight, self.embed.bias, rng=rng)
        x = x + self._positions((grid[0], grid[1]), x)
        x = self.transformer(x, self.norm)
        return ops.latent_projection(x, self.head.weight, self.head.bias, patch_size=self.patch_size, grid=tuple(grid))

    def set_activation_checkpointing(self, enabled: bool, recompute: str = "block") -> None:
        """Recompute each block, or its MLP alone (recompute="mlp"), in the backward pass in place of keeping its activations."""
        self.transformer.set_activation_checkpointing(enabled, recompute)
