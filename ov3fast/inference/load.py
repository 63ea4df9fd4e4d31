"""Loads a model from a folder or hub id: a full OpenVision3, or a released vision tower with a VAE in front of it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ov3fast.models import pretrained, vision_tower
from ov3fast.models.config import OpenVision3Config
from ov3fast.models.openvision3 import WEIGHT_FILES, OpenVision3
from ov3fast.models.tokenizer import CONFIG_FILE, FILE
from ov3fast.models.vae import FrozenVAE
from ov3fast.models.vit import ViTEncoder


class VisionTower(nn.Module):
    """A released tower and the VAE that makes its latents, with the encoding interface of OpenVision3. It can't decode."""

    def __init__(self, encoder: ViTEncoder, vae: FrozenVAE) -> None:
        super().__init__()
        encoder.set_vae(vae)
        self.encoder = encoder

    @property
    def device(self) -> torch.device:
        return self.encoder.cls_token.device

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1], or anything that `ov3fast.preprocess` takes -> (pooled [B, E], tokens [B, N, D])."""
        return cast("tuple[Tensor, Tensor]", self.encoder.encode(images))

    def encode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] -> (pooled [B, E], tokens [B, N, D])."""
        return cast("tuple[Tensor, Tensor]", self.encoder.encode_latents(latents))


def load_model(
    path: str | Path,
    *,
    vae: FrozenVAE | str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    image_size: int | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> OpenVision3 | VisionTower:
    """A model in eval mode from a folder or hub id.

    A folder with open_clip_config.json is a released vision tower; any other must have been written by OpenVision3.save_pretrained; a
    training run's folder means the model in it. vae: a FrozenVAE, a folder, a hub id or "small"; None: the model's own, or FLUX.1's for a
    tower. The other arguments as in OpenVision3.from_pretrained. FileNotFoundError or ValueError, in one line, says what is missing.
    """
    what = f"load_model({str(path)!r})"
    weights = pretrained.weight_patterns({*WEIGHT_FILES, *vision_tower.WEIGHT_FILES}, variant)
    files = ["config.json", FILE, CONFIG_FILE, vision_tower.CONFIG_FILE, *weights]
    device = pretrained.check_device(device, what)
    hub = pretrained.Hub(revision, token, cache_dir, local_files_only)
    folder = pretrained.resolve(path, what, files, hub)
    folder = pretrained.model_folder(folder, what)
    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: it is a file; name a model folder, a training run or a hub id (owner/name)")
    if (folder / vision_tower.CONFIG_FILE).is_file():
        encoder = vision_tower.load_vision_encoder(folder, device=device, dtype=dtype, image_size=image_size, variant=variant)
        if not isinstance(vae, FrozenVAE):
            vae_hub = pretrained.Hub(None, token, cache_dir, local_files_only)
            vae = FrozenVAE.from_pretrained(OpenVision3Config().vae if vae is None else vae, hub=vae_hub)
        return VisionTower(encoder, vae).to(device).eval()
    if not (folder / "config.json").is_file():
        inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"{what}: no model there: neither config.json nor {vision_tower.CONFIG_FILE} nor a folder model (it holds {inside})"
        )
    return OpenVision3.from_pretrained(
        folder, vae=vae, device=device, dtype=dtype, image_size=image_size, variant=variant,
        token=token, cache_dir=cache_dir, local_files_only=local_files_only,
    )  # fmt: skip
