"""The models that `optimize` supports, and how each is called on images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ov3fast.data.preprocess import as_images
from ov3fast.inference.blocks import describe
from ov3fast.inference.load import VisionTower
from ov3fast.inference.photos import photo_batch
from ov3fast.models.autoencoder import Autoencoder
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE
from ov3fast.models.vit import ViTEncoder

Kind = Literal["ov3fast", "autoencoder", "transformers", "timm", "open_clip"]
TRANSFORMERS = (
    "clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model", "dinov2", "dinov2_with_registers",
)  # fmt: skip
"""model_type of the supported transformers models."""

SIDE = 256
"""Side of the images that an autoencoder is measured on by default."""
PHOTOS = 8
"""Number of photos for int8 calibration by default."""


def kind_of(model: Any) -> Kind:
    """ValueError naming the model if it isn't supported."""
    if isinstance(model, OpenVision3 | VisionTower | ViTEncoder):
        return "ov3fast"
    names = {cls.__name__ for cls in type(model).__mro__}
    if isinstance(model, Autoencoder | FrozenVAE) or "AutoencoderKL" in names:
        return "autoencoder"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model, nn.Module):
        if model_type in TRANSFORMERS:
            return "transformers"
        packages = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
        libraries: tuple[Kind, ...] = ("timm", "open_clip")
        for library in libraries:
            if library in packages and any(describe(part) for part in model.modules()):
                return library
    called = type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")
    raise ValueError(
        f"optimize: {called} is not supported; it takes models of ov3fast, diffusers' AutoencoderKL, timm's and open_clip's ViTs, and "
        f"transformers models of type {', '.join(TRANSFORMERS)}"
    )


def vae_of(model: Any) -> Any:
    """The autoencoder that a model of ov3fast holds outside its modules, or None."""
    encoder = model.encoder if isinstance(model, OpenVision3 | VisionTower) else model
    found = encoder.vae if isinstance(encoder, ViTEncoder) else None
    return None if found is None else found.vae


def roots(model: Any) -> list[tuple[str, Any]]:
    """(path prefix, module tree) of the model, and of the autoencoder that it holds."""
    vae = vae_of(model)
    return [("", model)] + ([] if vae is None else [("vae.", vae)])


def default_images(model: Any, kind: Kind, photos: bool) -> Any:
    """A model's default input: a random image of its size, or a package's photos."""
    like = next(model.parameters())
    if getattr(getattr(model, "config", None), "model_type", "").startswith("siglip2"):
        return _siglip2(model, like)
    side = _side(model, kind)
    if photos:
        images = photo_batch(None, side, PHOTOS, "optimize: calibration")[0]
    else:
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(like.device, like.dtype if kind != "ov3fast" else torch.float32)


def caller(model: Any, kind: Kind, calibration: Any = None, photos: bool = False) -> Callable[[Any], list[Tensor]]:
    """Returns a function model -> its results on the calibration input. ValueError if that input has the wrong type."""
    given = calibration
    if given is None:
        calibration = default_images(model, kind, photos)
    elif kind in ("ov3fast", "autoencoder") and not isinstance(calibration, dict | tuple):
        calibration = as_images(calibration, _side(model, kind))
    elif not isinstance(calibration, Tensor | dict | tuple):
        raise ValueError(
            f"optimize: calibration must be a tensor of images, or a tuple or dict of the model's arguments; got {type(calibration).__name__}"
        )
    if kind in ("ov3fast", "autoencoder") and not isinstance(calibration, Tensor):
        what = "an AutoencoderKL" if kind == "autoencoder" else "a model of ov3fast"
        raise ValueError(f"optimize: calibration of {what} is a tensor of images, got {type(calibration).__name__}")
    if kind == "ov3fast":
        return _own(calibration, _latents(model, calibration, optional=not photos and given is None))
    if kind == "autoencoder":
        return lambda found: [_reconstructed(found, calibration)]
    if isinstance(calibration, dict):
        return lambda found: _tensors(found(**calibration))
    if isinstance(calibration, tuple):
        return lambda found: _tensors(found(*calibration))
    if kind == "transformers":
        name = "get_image_features" if hasattr(model, "get_image_features") else "forward"
        return lambda found: _tensors(getattr(found, name)(pixel_values=calibration.to(_dtype(found))))
    name = "encode_image" if hasattr(model, "encode_image") else "forward"
    return lambda found: _tensors(getattr(found, name)(calibration.to(_dtype(found))))


def _latents(model: Any, images: Tensor, optional: bool) -> Tensor | None:
    """Random latents in place of the images if the model's VAE is unavailable and `optional`; None if it is available."""
    encoder = model if isinstance(model, ViTEncoder) else model.encoder
    try:
        encoder.get_vae()
    except FileNotFoundError:
        if not optional:
            raise
        sides = (side // VAE_STRIDE for side in images.shape[2:])
        return torch.randn(len(images), encoder.config.in_channels, *sides, generator=torch.Generator().manual_seed(0))
    return None


def _own(images: Tensor, latents: Tensor | None) -> Callable[[Any], list[Tensor]]:
    def call(model: Any) -> list[Tensor]:
        with torch.no_grad():
            if latents is not None:
                return list(model.encode_latents(latents))
            pooled, tokens = model.encode(images)
            if not isinstance(model, OpenVision3):
                return [pooled, tokens]
            patch = VAE_STRIDE * model.config.vision.patch_size
            decoded = model.decode(tokens, (images.shape[2] // patch, images.shape[3] // patch))
            return [pooled, tokens, model.decode_latents(decoded).clamp(-1, 1)]

    return call


def _reconstructed(vae: Any, images: Tensor) -> Tensor:
    if isinstance(vae, FrozenVAE):
        return vae.decode(vae.encode(images))
    found: Tensor = vae.decode(vae.encode(images.to(_dtype(vae))).latent_dist.mean).sample
    return found


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "values"):
        output = output.values()
    return [value for value in output if isinstance(value, Tensor)]


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype


def _side(model: Any, kind: Kind) -> int:
    if kind == "ov3fast":
        return (model if isinstance(model, ViTEncoder) else model.encoder).config.image_size
    if kind == "autoencoder":
        return SIDE
    if kind == "transformers":
        return int(getattr(getattr(model.config, "vision_config", model.config), "image_size", 224))
    if kind == "timm":
        return int(getattr(getattr(model, "patch_embed", None), "img_size", (224,))[0])
    size = getattr(getattr(model, "visual", model), "image_size", 224)
    return int(size[0] if isinstance(size, tuple | list) else size)


def _siglip2(model: Any, like: Tensor) -> dict[str, Tensor]:
    """Input as its processor makes it: a square of as many patches as it has positions."""
    config = getattr(model.config, "vision_config", model.config)
    side = int(config.num_patches**0.5)
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(1, side * side, config.num_channels * config.patch_size**2, generator=generator) * 2 - 1
    return {
        "pixel_values": patches.to(like.device, like.dtype),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.int64, device=like.device),
        "spatial_shapes": torch.tensor([[side, side]], device=like.device),
    }
