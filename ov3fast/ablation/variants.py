"""Ablation variants: changes to a few recipe fields, addressed by dotted name."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ov3fast.models.pixels import CHANNELS, PIXELS
from ov3fast.recipes.config import Recipe

FULL = "full"


@dataclass(frozen=True)
class Variant:
    """name: of the run. group: variants that share a chart with the full recipe."""

    name: str
    group: str
    what: str
    """Description for the report."""
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Dotted name of a recipe field -> value."""
    sizes: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Dotted name of an integer recipe field -> factor applied to the recipe's own value."""

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the changes applied. ValueError names a field it doesn't have."""
        values = copy.deepcopy(recipe.to_dict())
        for name, value in self.changes.items():
            parent, key = _parent(values, name)
            parent[key] = value
        for name, factor in self.sizes.items():
            parent, key = _parent(values, name)
            parent[key] = max(1, round(factor * parent[key]))
        return Recipe.from_dict(values)


_PIXELS = {
    "vae": None,
    "model.vae": PIXELS,
    "model.vae_subfolder": None,
    "model.vision.in_channels": CHANNELS,
    "vae_dtype": "fp32",
}

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(FULL, "", "the recipe as it is"),
        Variant("no-rec", "Losses", "without L_rec: its heads learn behind a stop-gradient", {"objective.detached": "rec"}),
        Variant("no-und", "Losses", "without L_und: its heads learn behind a stop-gradient", {"objective.detached": "und"}),
        Variant("pixels", "Input", "pixels in place of the VAE's latents, in patches of 16 px, with the same losses", _PIXELS),
        Variant("tau-0", "Noise on the tokens", "no noise before the decoder", {"model.tau": 0.0}),
        Variant("tau-0.4", "Noise on the tokens", "sigma up to 0.4", {"model.tau": 0.4}),
        Variant("tau-0.8", "Noise on the tokens", "sigma up to 0.8", {"model.tau": 0.8}),
        Variant("tokens-normed", "Tokens", "tokens after the encoder's last norm", {"model.tokens": "post_ln"}),
        Variant("posterior-sample", "Posterior", "latents sampled, not the posterior's mean", {"model.posterior": "sample"}),
        Variant(
            "caption-1", "Caption weight", "captions with the contrastive loss's weight", {"objective.caption_weight": 1.0}
        ),
        Variant("caption-0", "Caption weight", "no captions", {"objective.caption_weight": 0.0}),
        Variant("decoder-shallow", "Decoder size", "a third of the decoder's blocks", sizes={"model.decoder.depth": 1 / 3}),
        Variant("decoder-deep", "Decoder size", "twice the decoder's blocks", sizes={"model.decoder.depth": 2.0}),
        Variant("encoder-shallow", "Encoder size", "half of the encoder's blocks", sizes={"model.vision.depth": 0.5}),
        Variant("encoder-deep", "Encoder size", "twice the encoder's blocks", sizes={"model.vision.depth": 2.0}),
    )
}
"""Sections 5.1 (losses), 5.2 (pixels) and 5.3 (sizes) of the paper, and options it doesn't ablate."""

PAPER = (FULL, "no-rec", "no-und", "pixels", "tau-0", "tau-0.4", "tau-0.8")
"""The default set: the paper's ablations, at one size, plus the token noise, which the paper doesn't ablate."""


def variants_named(names: Sequence[str]) -> list[Variant]:
    """The named variants, full recipe first. ValueError for an unknown name."""
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"ablate: no variant {name!r}; it takes {', '.join(VARIANTS)}")
    return [VARIANTS[name] for name in dict.fromkeys((FULL, *names))]


def _parent(values: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    *path, key = name.split(".")
    for part in path:
        values = values[part]
    if key not in values:
        raise ValueError(f"ablation: a recipe has no field {name!r}")
    return values, key
