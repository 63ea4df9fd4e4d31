"""timm's names for a vision tower: forward_features, forward_head, forward_intermediates and their kin, without timm itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ov3fast.interop._tower import Model, encode, encoder_of, hidden_states, loaded
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE


class TimmModel(nn.Module):
    """A vision tower with timm's methods; images [B, 3, H, W] in [-1, 1]. There is no CLS among the tokens: num_prefix_tokens is 0."""

    num_prefix_tokens = 0

    def __init__(self, model: Model | str | Path, vae: FrozenVAE | str | Path | None = None) -> None:
        super().__init__()
        self.model = loaded(model, vae)
        self._describe()

    def _describe(self) -> None:
        config = encoder_of(self.model).config
        self.embed_dim = self.num_features = self.head_hidden_size = config.width
        self.num_classes = config.embed_dim
        self.patch_size = config.patch_size * VAE_STRIDE
        self.pretrained_cfg = self.default_cfg = {
            "input_size": (3, config.image_size, config.image_size),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": config.embed_dim,
        }
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": config.width, "reduction": self.patch_size} for i in range(config.depth)
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> tokens [B, N, D]."""
        return encode(self.model, x)[1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> pooled [B, E], or with pre_logits [B, D], before the projection."""
        encoder = encoder_of(self.model)
        post_ln = isinstance(self.model, OpenVision3) and self.model.config.tokens == "post_ln"
        if encoder.config.final_ln_after_pool and post_ln:
            raise ValueError(
                'TimmModel.forward_head: the pooled vector is not made of normed tokens (tokens="post_ln"); call forward'
            )
        x = x.mean(1)
        x = encoder.norm(x) if encoder.config.final_ln_after_pool else x
        return x if pre_logits else encoder.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> pooled [B, E]."""
        return encode(self.model, x)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **ignored: Any,
    ) -> Any:
        """(tokens, intermediates), or the latter alone. indices: blocks, negative ones from the end, or the last n; None: all."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}")
        encoder = encoder_of(self.model)
        depth = encoder.config.depth
        if isinstance(indices, int):
            chosen = list(range(depth - indices, depth))
        else:
            chosen = list(range(depth)) if indices is None else [i % depth if -depth <= i < depth else depth for i in indices]
        if not all(0 <= i < depth for i in chosen):
            raise ValueError(f"forward_intermediates: indices must be blocks 0..{depth - 1}, got {indices!r}")
        _, states = hidden_states(self.model, x)
        found = [encoder.norm(states[i + 1]) if norm else states[i + 1] for i in chosen]
        if output_fmt == "NCHW":
            grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
            found = [state.transpose(1, 2).unflatten(2, grid).contiguous() for state in found]
        return found if intermediates_only else (states[-1], found)

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, norm: bool = False, **ignored: Any
    ) -> tuple[Tensor, ...]:
        """The last n blocks' tokens, or those of the blocks named: [B, N, D], or with reshape [B, D, h, w]."""
        return tuple(self.forward_intermediates(x, n, norm, "NCHW" if reshape else "NLC", intermediates_only=True))

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Another square size in pixels. ValueError for a patch size, which the weights fix, or two sides that differ."""
        if patch_size is not None and patch_size != self.patch_size:
            raise ValueError(f"set_input_size: the patch size is {self.patch_size}, got {patch_size}")
        if img_size is None:
            return
        sides = {img_size} if isinstance(img_size, int) else set(img_size)
        if len(sides) != 1:
            raise ValueError(f"set_input_size: img_size must be square, got {img_size}")
        sized = self.model if isinstance(self.model, OpenVision3) else encoder_of(self.model)
        sized.set_image_size(sides.pop())
        self._describe()
