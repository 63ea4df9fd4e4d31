"""A trained generator in a folder: config.json, generator.safetensors (the weights' average), statistics.safetensors.

config.json names the tokenizer it was trained with, and its classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ov3fast import __version__
from ov3fast.generation import flow, guidance
from ov3fast.generation.ddt import DDT, GeneratorConfig, InContextDDT, build_generator
from ov3fast.generation.statistics import LatentStatistics, as_tokens
from ov3fast.io import atomic_folder
from ov3fast.models.openvision3 import OpenVision3

CONFIG, WEIGHTS, STATISTICS = "config.json", "generator.safetensors", "statistics.safetensors"
GENERATOR = "generator"
"""Folder within a run."""


@dataclass
class SavedGenerator:
    """generator with its average's weights; statistics of the latents; model: the tokenizer's folder or hub id; classes: names, in the
    order of labels ([] for a generator conditioned on text)."""

    generator: DDT | InContextDDT
    statistics: LatentStatistics
    model: str
    classes: list[str]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        config = {
            "generator": self.generator.config.to_dict(),
            "model": self.model,
            "classes": self.classes,
            "ov3fast_version": __version__,
        }
        with atomic_folder(folder) as temporary:
            (temporary / CONFIG).write_text(json.dumps(config, indent=1))
            save_file({name: value.contiguous() for name, value in self.generator.state_dict().items()}, temporary / WEIGHTS)
            self.statistics.save(temporary / STATISTICS)

    @classmethod
    def load(cls, folder: str | Path) -> SavedGenerator:
        """From its folder, or the run around it. FileNotFoundError, or ValueError for a file that doesn't fit."""
        from safetensors.torch import load_file

        folder = Path(folder).expanduser()
        folder = folder / GENERATOR if (folder / GENERATOR / CONFIG).is_file() else folder
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"generate: {folder} holds no generator ({CONFIG} and {WEIGHTS}); `ov3fast train --recipe generate-demo` makes one"
            )
        try:
            config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
            sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in config["generator"].items()}
            generator = build_generator(GeneratorConfig(**sizes))
            generator.load_state_dict(load_file(folder / WEIGHTS))
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"generate: {folder} does not fit this version: {' '.join(str(error).split())[:300]}") from None
        statistics = LatentStatistics.load(folder / STATISTICS)
        return cls(generator.requires_grad_(False).eval(), statistics, config["model"], config["classes"])

    def label_of(self, name: str) -> int:
        """ValueError for a class that it does not know."""
        if name not in self.classes:
            raise ValueError(
                f"generate: class must be one of {', '.join(self.classes) or 'none: this one takes texts'}; got {name!r}"
            )
        return self.classes.index(name)

    @torch.inference_mode()
    def sample(
        self,
        condition: Tensor,
        indices: Sequence[int],
        *,
        seed: int = 0,
        steps: int = 50,
        weight: float = 1.0,
        method: str = "euler",
        interval: tuple[float, float] = (0.1, 1.0),
    ) -> Tensor:
        """Latents [B, C, H, W], not normalized, one per row of condition; row i is a function of (seed, indices[i]) and its condition.

        weight: of guidance, 1 for none; internal where the generator has a base head, else classifier-free.
        """
        generator, shape = self.generator, self.statistics.mean.shape
        denoiser = generator.denoiser(condition)
        if weight != 1 and isinstance(generator, InContextDDT):
            denoiser = guidance.internal(lambda x, t: generator(x, t, condition), weight, interval)  # type: ignore[arg-type, return-value]
        elif weight != 1:
            denoiser = guidance.classifier_free(denoiser, generator.denoiser(generator.null(condition)), weight, interval)
        times = flow.sampling_times(steps, flow.time_shift(shape))
        noise = flow.noise_of(seed, indices, shape).to(condition.device)
        return self.statistics.denormalize(flow.sample(denoiser, noise, times, method))

    @torch.inference_mode()
    def pictures(self, model: OpenVision3, latents: Tensor) -> Tensor:
        """Latents, as `sample` gives them -> uint8 [B, 3, H, W] by the tokenizer's two decoders; floor(255 x), as RAE writes images."""
        found = model.decode_latents(model.decode(as_tokens(latents).to(model.device)))
        return (((found.float().clamp(-1, 1) + 1) / 2) * 255).floor().to(torch.uint8).cpu()
