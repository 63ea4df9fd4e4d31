"""A trained generator in a folder: config.json, generator.safetensors (EMA weights), statistics.safetensors.

config.json also names the tokenizer it was trained with, and its classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ov3fast import __version__
from ov3fast.generation import flow, guidance
from ov3fast.generation.ddt import DDT, GeneratorConfig, InContextDDT, build_generator
from ov3fast.generation.quantized import quantized
from ov3fast.generation.robustness import as_pictures
from ov3fast.generation.statistics import LatentStatistics, as_tokens
from ov3fast.io import atomic_folder
from ov3fast.models.openvision3 import OpenVision3

CONFIG, WEIGHTS, STATISTICS = "config.json", "generator.safetensors", "statistics.safetensors"
GENERATOR = "generator"
"""Subfolder of a run folder."""
CALIBRATED, CALIBRATION_STEPS = 4, 10
"""Samples and steps of the int8 calibration."""
Precision = Literal["fp32", "bf16", "int8"]


@dataclass
class SavedGenerator:
    """generator: with EMA weights; statistics: of the latents; model: the tokenizer's folder or hub id; classes: names in label
    order, [] for a text-conditional generator; shift: the time shift used in training."""

    generator: DDT | InContextDDT
    statistics: LatentStatistics
    model: str
    classes: list[str]
    shift: float
    _quantized: Any = None

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        config = {
            "generator": self.generator.config.to_dict(),
            "model": self.model,
            "classes": self.classes,
            "time_shift": self.shift,
            "ov3fast_version": __version__,
        }
        with atomic_folder(folder) as temporary:
            (temporary / CONFIG).write_text(json.dumps(config, indent=1))
            save_file({name: value.contiguous() for name, value in self.generator.state_dict().items()}, temporary / WEIGHTS)
            self.statistics.save(temporary / STATISTICS)

    @classmethod
    def load(cls, folder: str | Path) -> SavedGenerator:
        """From its folder or its run folder. FileNotFoundError if it holds no generator; ValueError for incompatible files."""
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
            shift = float(config.get("time_shift") or flow.time_shift((sizes["channels"], sizes["height"], sizes["width"])))
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"generate: {folder} does not fit this version: {' '.join(str(error).split())[:300]}") from None
        statistics = LatentStatistics.load(folder / STATISTICS)
        return cls(generator.requires_grad_(False).eval(), statistics, config["model"], config["classes"], shift)

    def label_of(self, name: str) -> int:
        """Label of a class name. ValueError for an unknown class."""
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
        precision: Precision = "fp32",
        worse: SavedGenerator | None = None,
    ) -> Tensor:
        """Denormalized latents [B, C, H, W] for B conditions; row i depends only on (seed, indices[i]) and its condition.

        weight: guidance weight, 1 for none. Guidance is AutoGuidance given `worse`, a smaller or less trained generator with
        the same latents and classes (else ValueError); otherwise internal if the generator has a base head, else
        classifier-free. interval: of t, in which guidance applies. precision: of the network's matrix products; the sampler's
        state is always float32. RuntimeError if int8 is unavailable here.
        """
        generator, shape = self.generator if precision != "int8" else self._in_int8(), self.statistics.mean.shape
        denoiser = generator.denoiser(condition)
        if worse is not None and weight != 1:
            if worse.classes != self.classes or worse.statistics.mean.shape != shape:
                raise ValueError("generate: AutoGuidance's other generator must be of the same classes and latents")
            other = worse.generator if precision != "int8" else worse._in_int8()
            denoiser = guidance.autoguidance(denoiser, other.denoiser(condition), weight, interval)
        elif weight != 1 and isinstance(generator, InContextDDT):
            denoiser = guidance.internal(lambda x, t: generator(x, t, condition), weight, interval)  # type: ignore[arg-type, return-value]
        elif weight != 1:
            denoiser = guidance.classifier_free(denoiser, generator.denoiser(generator.null(condition)), weight, interval)
        times = flow.sampling_times(steps, self.shift)
        noise = flow.noise_of(seed, indices, shape).to(condition.device)
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=precision != "fp32"):
            return self.statistics.denormalize(flow.sample(denoiser, noise, times, method))

    def _in_int8(self) -> DDT | InContextDDT:
        """The generator with int8 products, quantized on first use."""
        if self._quantized is None:
            generator, config, shape = self.generator, self.generator.config, self.statistics.mean.shape
            if config.classes:
                condition = torch.linspace(0, config.classes, CALIBRATED, dtype=torch.float64).round().long()
            else:
                condition = generator.null(torch.zeros(CALIBRATED, 1, config.text_width))
            times, noise = flow.sampling_times(CALIBRATION_STEPS, self.shift), flow.noise_of(0, range(CALIBRATED), shape)
            with torch.autocast("cpu", torch.bfloat16):
                self._quantized = quantized(generator, lambda: flow.sample(generator.denoiser(condition), noise, times))
        return self._quantized

    @torch.inference_mode()
    def pictures(self, model: OpenVision3, latents: Tensor) -> Tensor:
        """Decode latents from `sample` with the tokenizer's two decoders -> uint8 [B, 3, H, W]."""
        return as_pictures(model.decode_latents(model.decode(as_tokens(latents).to(model.device))))
