"""The door to open_clip's loops (CLIP_benchmark and its kin): its functions' names and contracts, without open_clip itself.

model, _, preprocess = create_model_and_transforms("runs/demo")
tokenizer = get_tokenizer("runs/demo")
model.encode_image(preprocess(image)[None], normalize=True) @ model.encode_text(tokenizer(["a cat"]), normalize=True).T
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ov3fast.data.preprocess import preprocess
from ov3fast.interop._tower import Model, encoder_of, loaded
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE
from ov3fast.models.vision_tower import save_vision_encoder

__all__ = ["CLIP", "Preprocess", "TextTokenizer", "create_model_and_transforms", "export", "get_tokenizer"]


class Preprocess:
    """A Pillow image -> float32 [3, image_size, image_size] in [-1, 1]: `ov3fast.preprocess`."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Any) -> Tensor:
        return preprocess(image, self.image_size)[0]

    def __repr__(self) -> str:
        return f"Preprocess({self.image_size})"


class TextTokenizer:
    """Texts -> ids [B, context_length] int64."""

    def __init__(self, model: OpenVision3) -> None:
        self.tokenizer, self.context_length = model.tokenizer, model.config.text.context_length
        self.vocab_size = model.config.text.vocab_size

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.tokenizer(texts, context_length or self.context_length, kind="text")


class CLIP(nn.Module):
    """An OpenVision3 with open_clip's methods; `visual` is its vision tower. A released tower has no text, and encode_text refuses."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.visual = encoder_of(model)
        self.visual.image_size = self.visual.config.image_size

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm, as in open_clip."""
        return self._whole("logit_scale").logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self._whole("logit_bias").logit_bias

    @property
    def context_length(self) -> int:
        return self._whole("context_length").config.text.context_length

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, E]."""
        pooled = self.model.encode(image)[0]
        return F.normalize(pooled.float(), dim=-1) if normalize else pooled

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Ids [B, L] of `get_tokenizer` -> [B, E]."""
        whole = self._whole("encode_text")
        return whole.encode_text(text.to(whole.device), normalize=normalize)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(image features, text features, logit scale), features normalised, the scale exponentiated; None for what wasn't given."""
        images = None if image is None else self.encode_image(image, normalize=True)
        texts = None if text is None else self.encode_text(text, normalize=True)
        return images, texts, self.logit_scale.exp()

    def _whole(self, what: str) -> OpenVision3:
        if not isinstance(self.model, OpenVision3):
            raise ValueError(f"CLIP.{what}: a released vision tower has no text encoder; it takes an OpenVision3")
        return self.model


def create_model_and_transforms(
    model_name: Model | str | Path,
    pretrained: str | None = None,
    precision: str | None = None,
    device: str | torch.device = "cpu",
    *,
    vae: FrozenVAE | str | Path | None = None,
    **ignored: Any,
) -> tuple[CLIP, Preprocess, Preprocess]:
    """(model, transform for training, transform for evaluation), as open_clip's. model_name: what `inference.load_model` takes;
    "local-dir:" before a folder is open_clip's way to say so. precision: fp32 (default for
    a folder), bf16 or fp16; a model in memory is cast in place."""
    if precision is None:
        precision = "fp32" if isinstance(model_name, str | Path) else "as it is"
    dtypes: dict[str, torch.dtype | None] = {
        "as it is": None,
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "pure_bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    if precision not in dtypes:
        raise ValueError(
            f"create_model_and_transforms: precision must be one of {', '.join(list(dtypes)[1:])}; got {precision!r}"
        )
    name = model_name.removeprefix("local-dir:") if isinstance(model_name, str) else model_name
    model = loaded(name, vae).to(device, dtypes[precision]).eval()
    transform = Preprocess(encoder_of(model).config.image_size)
    return CLIP(model), transform, transform


def get_tokenizer(model_name: OpenVision3 | CLIP | str | Path) -> TextTokenizer:
    """The tokenizer of a model folder, or of a model in memory. ValueError for a released tower."""
    model: Any = model_name.model if isinstance(model_name, CLIP) else model_name
    if isinstance(model, str | Path):
        model = OpenVision3.from_pretrained(str(model).removeprefix("local-dir:"))
    if not isinstance(model, OpenVision3):
        raise ValueError("get_tokenizer: a released vision tower has no text encoder; it takes an OpenVision3")
    return TextTokenizer(model)


def export(model: Model | str | Path, out: str | Path) -> Path:
    """Writes the vision tower in the released layout (open_clip_config.json and open_clip_model.safetensors), which the official
    repository's open_clip and `load_vision_encoder` read. The text side has no place in it."""
    save_vision_encoder(encoder_of(loaded(model)), out)
    return Path(out)
