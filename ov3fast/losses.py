"""The paper's objective (arXiv 2601.15369, equations 4 to 6), from the operators.

    L_rec = pixel * l1(x, x^) + beta * l1(z_vae, z^_vae) + lambda * LPIPS(x, x^)       (4)
    L_und = caption * L_caption + alpha * L_contrastive(z_u, z_txt)                    (5)
    L     = w_rec * L_rec + w_und * L_und                                              (6)

Table 1: beta 0.4, alpha 1, w_rec 0.5, w_und 1; lambda 0 in stage 1 and 0.5 in stage 2. Not stated in the paper, so options
here: the reductions, the LPIPS backbone, and softmax (CLIP) or sigmoid (SigLIP) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast import ops

RECONSTRUCTION, UNDERSTANDING = ("pixel", "latent", "lpips"), ("caption", "contrastive")
PARTS = RECONSTRUCTION + UNDERSTANDING


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and reductions of the loss; the defaults are Table 1's, with LPIPS as in stage 1 (a stage may set it)."""

    rec_weight: float = 0.5
    """omega_rec of equation 6."""
    und_weight: float = 1.0
    """omega_und of equation 6."""
    pixel_weight: float = 1.0
    """Weight of l1(x, x^), 1 in equation 4."""
    latent_weight: float = 0.4
    """beta of equation 4."""
    lpips_weight: float = 0.0
    """lambda of equation 4: 0 in stage 1, 0.5 in stage 2."""
    caption_weight: float = 1.0
    """Weight of the caption loss, 1 in equation 5."""
    contrastive_weight: float = 1.0
    """alpha of equation 5."""
    contrastive: str = "softmax"
    """"softmax" (CLIP) or "sigmoid" (SigLIP)."""
    pixel_reduction: str = "mean"
    """"mean" over all elements, or "sum" over each image's elements (mean over images)."""
    latent_reduction: str = "mean"
    """As pixel_reduction, for the latents."""
    caption_reduction: str = "mean"
    """"mean" over the caption tokens that count, or "sum" of them per caption (mean over captions)."""
    detached: str | None = None
    """Branch that takes the tokens without their gradient, "rec" or "und": its heads learn, the encoder learns from the other branch
    alone. How a branch's losses can be followed in a run that is trained without it (section 5.1)."""

    def __post_init__(self) -> None:
        for name in ("rec_weight", "und_weight", *(f"{part}_weight" for part in PARTS)):
            if not getattr(self, name) >= 0:
                raise ValueError(f"ObjectiveConfig: {name} must be 0 or more, got {getattr(self, name)}")
        for name in ("pixel_reduction", "latent_reduction", "caption_reduction"):
            if getattr(self, name) not in ("mean", "sum"):
                raise ValueError(f"ObjectiveConfig: {name} must be 'mean' or 'sum', got {getattr(self, name)!r}")
        if self.contrastive not in ("softmax", "sigmoid"):
            raise ValueError(f"ObjectiveConfig: contrastive must be 'softmax' or 'sigmoid', got {self.contrastive!r}")
        if self.detached not in (None, "rec", "und"):
            raise ValueError(f"ObjectiveConfig: detached must be 'rec', 'und' or None, got {self.detached!r}")
        other = {"rec": "und", "und": "rec"}.get(self.detached or "")
        if other is not None and getattr(self, f"{other}_weight") == 0:
            raise ValueError(
                f"ObjectiveConfig: detached {self.detached!r} with {other}_weight 0 leaves the encoder without a gradient"
            )

    @property
    def needs_pixels(self) -> bool:
        """Whether the VAE decoder must run: a pixel loss or LPIPS has weight."""
        return self.rec_weight > 0 and (self.pixel_weight > 0 or self.lpips_weight > 0)


class Objective(nn.Module):
    """objective(outputs, ...) -> dict of float32 scalars: each part, "rec", "und" and "loss".

    `parts` computes the parts and `combine` sums them, so that a caller may change a part in between (a micro-batch's share of the
    caption tokens, say) and never a sum. A part whose weight is 0, or whose inputs are not given, is left out of the sums and of the
    dict.
    """

    def __init__(self, config: ObjectiveConfig, lpips: nn.Module | None = None, exchange: str = "gather"):
        """exchange: how texts cross the ranks in the contrastive part (see ops.contrastive_loss)."""
        super().__init__()
        if config.lpips_weight > 0 and lpips is None:
            raise ValueError(
                "Objective: lpips_weight is above 0, so lpips must be a module; see ov3fast.models.perceptual.LPIPS"
            )
        self.config, self.lpips, self.exchange = config, lpips, exchange

    def forward(self, outputs: Any, **inputs: Any) -> dict[str, Tensor]:
        """combine(parts(outputs, ...))."""
        return self.combine(self.parts(outputs, **inputs))

    def parts(
        self,
        outputs: Any,
        *,
        latents: Tensor | None = None,
        images: Tensor | None = None,
        images_hat: Tensor | None = None,
        pairs: Tensor | None = None,
        group: Any = None,
        contrastive: bool = True,
    ) -> dict[str, Tensor]:
        """The parts by name, unweighted float32 scalars. outputs: the model's ModelOutput.

        latents [R,C,h,w]: the VAE's latents of the images that were decoded, like outputs.latents_hat. images, images_hat
        [P,3,H,W] in [-1,1]: the originals and the decoded images. pairs int64 [V,T]: row of outputs.pooled that shows view v of
        text t; the contrastive loss is the mean over views (None: image i belongs to text i). group: process group over which the
        contrastive batch is gathered. contrastive=False leaves that part to the caller.
        """
        config = self.config
        parts: dict[str, Tensor] = {}
        if images is not None and images_hat is not None:
            if config.pixel_weight > 0:
                parts["pixel"] = l1(images_hat, images, config.pixel_reduction)
            if config.lpips_weight > 0 and self.lpips is not None:
                parts["lpips"] = self.lpips(images_hat.float(), images.float()).mean()
        if latents is not None and outputs.latents_hat is not None and config.latent_weight > 0:
            parts["latent"] = l1(outputs.latents_hat, latents, config.latent_reduction)
        if outputs.caption_hidden is not None and config.caption_weight > 0:
            parts["caption"] = caption_loss(
                outputs.caption_hidden, outputs.caption_weight, outputs.caption_labels, config.caption_reduction
            )
        if contrastive and outputs.text is not None and config.contrastive_weight > 0:
            parts["contrastive"] = self.contrastive(
                outputs.pooled, outputs.text, outputs.logit_scale, outputs.logit_bias, pairs, group
            )
        return parts

    def combine(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts and their weighted sums: "rec" and "und" (equations 4 and 5), and "loss" (equation 6)."""
        config = self.config
        zero = torch.zeros((), device=next(iter(parts.values())).device) if parts else torch.zeros(())
        rec, und = (
            sum((getattr(config, f"{name}_weight") * parts[name] for name in names if name in parts), start=zero)
            for names in (RECONSTRUCTION, UNDERSTANDING)
        )
        return {**parts, "rec": rec, "und": und, "loss": config.rec_weight * rec + config.und_weight * und}

    def contrastive(
        self,
        pooled: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        pairs: Tensor | None = None,
        group: Any = None,
    ) -> Tensor:
        """The contrastive part alone: pooled [B,E] and text [T,E], not normalised; pairs and group as in `parts`."""
        return ops.contrastive_loss(
            pooled if pairs is None else pooled[pairs], text, logit_scale,
            kind=self.config.contrastive,
            logit_bias=logit_bias if self.config.contrastive == "sigmoid" else None,
            group=group,
            exchange=self.exchange,
        )  # fmt: skip


def l1(actual: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Mean absolute difference in float32; "sum" adds each image's elements and averages over images."""
    if actual.shape != target.shape:
        raise ValueError(f"l1: actual and target must have one shape, got {tuple(actual.shape)} and {tuple(target.shape)}")
    difference = (actual.float() - target.float()).abs()
    return difference.mean() if reduction == "mean" else difference.flatten(1).sum(1).mean()


def caption_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the captions' next tokens: hidden [B,T,D], weight [V,D], labels int64 [B,T], -100 where none counts."""
    if reduction == "mean":
        return ops.linear_cross_entropy(hidden, weight, labels)
    return ops.linear_cross_entropy(hidden, weight, labels, reduction="sum") / max(len(labels), 1)
