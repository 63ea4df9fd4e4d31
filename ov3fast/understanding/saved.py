"""A run's output, and inference with it: config.json, projector.safetensors, language_model/ (transformers, with tokenizer)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ov3fast import __version__
from ov3fast.data.images import ImageError, decode_image
from ov3fast.io import atomic_folder
from ov3fast.understanding.conversations import Encoder
from ov3fast.understanding.model import Understander, load_tokenizer
from ov3fast.understanding.towers import Tower, load_tower

CONFIG, WEIGHTS, LANGUAGE_MODEL = "config.json", "projector.safetensors", "language_model"
MODEL = "model"
"""Subfolder of a run."""


@dataclass
class Answerer:
    """about: tower, vae, feature_layer, image_aspect, template, image_tokens (0: it sees no images) and feature_width."""

    model: Understander
    tokenizer: Any
    about: dict[str, Any]
    tower_given: Tower | None = field(default=None, repr=False)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.about["template"], self.about["image_tokens"])

    @cached_property
    def tower(self) -> Tower:
        """Loaded lazily, on the first image."""
        if self.tower_given is not None:
            return self.tower_given
        about = self.about
        return load_tower(
            about["tower"], layer=about["feature_layer"], aspect=about["image_aspect"], vae=about["vae"], device=self.model.device
        )  # fmt: skip

    def save(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        with atomic_folder(folder) as temporary:
            (temporary / CONFIG).write_text(json.dumps({**self.about, "ov3fast_version": __version__}, indent=1))
            projector = {name: value.contiguous() for name, value in self.model.projector.state_dict().items()}
            save_file(projector, temporary / WEIGHTS)
            self.model.language_model.save_pretrained(temporary / LANGUAGE_MODEL)
            self.tokenizer.save_pretrained(temporary / LANGUAGE_MODEL)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        tower: str | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
    ) -> Answerer:
        """From the model folder or its run. tower: its current location, if it has moved. FileNotFoundError or ValueError."""
        import transformers
        from safetensors.torch import load_file

        folder = Path(folder).expanduser()
        folder = folder / MODEL if (folder / MODEL / CONFIG).is_file() else folder
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"understanding: {folder} holds no model ({CONFIG} and {WEIGHTS}); `ov3fast train --recipe understand-demo` makes one"
            )
        try:
            about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            options = {"trust_remote_code": trust_remote_code}
            language_model = transformers.AutoModelForCausalLM.from_pretrained(folder / LANGUAGE_MODEL, **options)
            tokenizer = load_tokenizer(folder / LANGUAGE_MODEL, trust_remote_code)
            model = Understander(language_model, about["feature_width"])
            model.projector.load_state_dict(load_file(folder / WEIGHTS))
        except (KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"understanding: {folder} does not fit this version: {' '.join(str(error).split())[:300]}"
            ) from None
        if tower is not None:
            about["tower"] = tower
        return cls(model.to(device or "cpu").requires_grad_(False).eval(), tokenizer, about)

    def answer(
        self,
        images: Sequence[Image.Image | str | Path | None],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 32,
        batch_size: int = 32,
    ) -> list[str]:
        """The answer to each question about the image at the same index; None: a question without an image."""
        if len(images) != len(questions):
            raise ValueError(f"understanding: as many images as questions are needed, got {len(images)} and {len(questions)}")
        answers = []
        for start in range(0, len(questions), batch_size):
            part, asked = images[start : start + batch_size], questions[start : start + batch_size]
            seen = [self.tower.view(opened(image)) for image in part if image is not None] if self.about["image_tokens"] else []
            features = self.tower.features(torch.stack(seen)) if seen else None
            answers += self.answer_features(features, [image is not None for image in part], asked, max_new_tokens)
        return answers

    def answer_features(
        self, features: Tensor | None, sees: Sequence[bool], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Same as `answer`, from image features [images, N, D], one entry for each question with an image."""
        prompts = [self.encoder.prompt(text, "" if seen else None).ids for text, seen in zip(questions, sees, strict=True)]
        features = None if features is None else features.to(self.model.device)
        rows = self.model.generate(prompts, features, self.encoder.end[0], max_new_tokens)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def opened(image: Image.Image | str | Path) -> Image.Image:
    """ValueError names a file that is not an image."""
    if isinstance(image, Image.Image):
        return image
    try:
        return decode_image(Path(image).expanduser().read_bytes())
    except ImageError as error:
        raise ValueError(f"image {image}: {error.reason} ({error})") from None
