"""The towers of the LLaVA and LLaVA-NeXT repositories, for `build_vision_tower`:

    from ov3fast.interop.llava import OpenVision3VisionTower
    tower = OpenVision3VisionTower("runs/demo", args=model_args)

All N patch tokens are kept whatever `mm_vision_select_feature` says: there is no CLS among them, which "patch" would cut off the front.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast.interop._tower import Model, encoder_of, hidden_states, loaded
from ov3fast.models import pretrained, vision_tower
from ov3fast.models.config import VAE_STRIDE, OpenVision3Config, VisionConfig
from ov3fast.models.vae import FrozenVAE

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS = ("half", "clip")


class OpenVision3VisionTower(nn.Module):
    """A vision tower with what LLaVA's code asks of one.

    vision_tower: folder or hub id, or a model in memory. args: mm_vision_select_layer (default -2; -1 is the output), as LLaVA's arguments.
    delay_load: the weights come with `load_model`. pixels: "half" for pixels in [-1, 1], which `image_processor` makes; "clip" for those of
    CLIP's processor, which are brought back to [-1, 1] first.
    """

    def __init__(
        self,
        vision_tower: Model | str | Path,
        args: Any = None,
        delay_load: bool = False,
        *,
        pixels: str = "half",
        vae: FrozenVAE | str | Path | None = None,
    ) -> None:
        super().__init__()
        if pixels not in PIXELS:
            raise ValueError(f"OpenVision3VisionTower: pixels must be one of {', '.join(PIXELS)}; got {pixels!r}")
        self.is_loaded = False
        self.vision_tower_name = str(vision_tower) if isinstance(vision_tower, str | Path) else type(vision_tower).__name__
        self.select_layer = int(getattr(args, "mm_vision_select_layer", -2))
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.pixels = pixels
        self.vision_tower: Any = None
        # In a tuple, so that a model in memory is no submodule before it is loaded.
        self._source = (vision_tower, vae)
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Loads the weights, frozen; nothing where they are loaded."""
        if self.is_loaded:
            return
        self.vision_tower = loaded(*self._source).requires_grad_(False).eval()
        self.is_loaded = True

    @property
    def image_processor(self) -> Any:
        """transformers' kind of image processor; its pixels are in [-1, 1]."""
        from ov3fast.interop.remote_code.image_processing_openvision3 import OpenVision3ImageProcessor

        return OpenVision3ImageProcessor(size=self._vision.image_size)

    def feature_select(self, states: list[Tensor]) -> Tensor:
        """The states of `select_layer` [B, N, D]: all patch tokens. ValueError for another `mm_vision_select_feature` than LLaVA's."""
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"Unexpected select feature: {self.select_feature}")
        return states[self.select_layer]

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Any:
        """Images [B, 3, H, W], or a list of [3, H, W] -> features [B, N, D], or a list of [1, N, D], in the images' dtype."""
        if isinstance(images, list):
            return [self._features(image[None]) for image in images]
        return self._features(images)

    def _features(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device, torch.float32)
        if self.pixels == "clip":
            mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
            pixels = ((pixels * std + mean) * 2 - 1).clamp(-1, 1)
        _, states = hidden_states(self.vision_tower, pixels)
        return self.feature_select(states).to(images.dtype)

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return encoder_of(self.vision_tower).cls_token.dtype

    @property
    def device(self) -> torch.device:
        return encoder_of(self.vision_tower).device

    @property
    def config(self) -> SimpleNamespace:
        """hidden_size, image_size, patch_size (pixels), num_hidden_layers, num_attention_heads, intermediate_size, projection_dim."""
        own = self._vision
        return SimpleNamespace(
            model_type="openvision3_vision_model",
            hidden_size=own.width,
            image_size=own.image_size,
            patch_size=own.patch_size * VAE_STRIDE,
            num_hidden_layers=own.depth,
            num_attention_heads=own.heads,
            intermediate_size=own.mlp_dim,
            projection_dim=own.embed_dim,
        )

    @property
    def hidden_size(self) -> int:
        return self._vision.width

    @property
    def num_patches_per_side(self) -> int:
        return self._vision.grid

    @property
    def num_patches(self) -> int:
        return self._vision.grid**2

    @property
    def image_size(self) -> int:
        return self._vision.image_size

    @property
    def _vision(self) -> VisionConfig:
        source = self.vision_tower if self.is_loaded else self._source[0]
        return _read_config(source) if isinstance(source, str | Path) else encoder_of(source).config


def _read_config(path: str | Path) -> VisionConfig:
    """The vision half's config without its weights."""
    what = f"OpenVision3VisionTower({str(path)!r})"
    files = ["config.json", vision_tower.CONFIG_FILE]
    folder = pretrained.model_folder(pretrained.resolve(path, what, files), what)
    if (folder / vision_tower.CONFIG_FILE).is_file():
        return vision_tower.vision_config_of(pretrained.read_json(folder / vision_tower.CONFIG_FILE, what), {}, what)
    return OpenVision3Config.from_dict(pretrained.read_json(folder / "config.json", what)).vision
