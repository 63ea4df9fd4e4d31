"""One optimizer step's gradients: micro-batches of the global batch -> forward -> losses -> backward.

A global batch is cut into S = world * accumulate micro-batches; rank r works through number r * accumulate and the next ones. All
that is random in one (noise, its sigma, which images are decoded or captioned) is a function of (seed, stage, step, place in the
global batch), so a step can be computed again, and runs with the same S are the same run however S is split.

The loss of S micro-batches is that of the whole batch: means over images are averaged (micro-batches have one size), the caption loss
is weighted by each one's share of the tokens, and the contrastive loss is computed over all of a rank's micro-batches and all ranks
(`contrastive_over="batch"`): the features are computed once without a graph, the loss and its gradient at the features follow, and the
second pass sends that gradient into the towers (GradCache, Gao et al. 2021, arXiv 2101.06983).

Legend: m images of a micro-batch, T texts, V views, C latent channels, N tokens, D width, E embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ov3fast import ops
from ov3fast.losses import Objective
from ov3fast.models.openvision3 import ModelOutput, OpenVision3
from ov3fast.training.optimizer import AdamW
from ov3fast.training.parallel import Parallel
from ov3fast.training.timing import Timer


@dataclass
class MicroBatch:
    """What one forward pass takes; tensors are on the device."""

    keys: list[str]
    latents: Tensor
    """[m, C, h, w] in the model's convention."""
    text_ids: Tensor | None
    """[T, L] int64."""
    pairs: Tensor | None
    """[V, T] int64: the image row that shows view v of text t."""
    caption_ids: Tensor | None
    """[m, L'] int64; rows that are not in caption_rows are padding."""
    caption_rows: Tensor | None
    """int64: the images that are captioned."""
    latent_rows: Tensor | None
    """int64: the images that the reconstruction branch sees; None: all."""
    pixel_rows: Tensor | None
    """int64: which of those go through the VAE decoder."""
    images: Tensor | None
    """[len(pixel_rows), 3, H, W] in [-1, 1]."""
    sigma: Tensor | None
    """One per reconstructed image."""
    rng: Tensor
    """(seed, offset) of the noise."""
    caption_share: float | Tensor = 1.0
    """Caption tokens of this micro-batch over the mean of all micro-batches."""

    @property
    def text_index(self) -> Tensor | None:
        """[m]: each image's text; 0 for images without one."""
        if self.pairs is None:
            return None
        index = torch.zeros(len(self.keys), dtype=torch.int64, device=self.pairs.device)
        index[self.pairs.flatten()] = torch.arange(self.pairs.shape[1], device=self.pairs.device).repeat(len(self.pairs))
        return index


def branches(micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
    """What the ranks must have in common: how many micro-batches, images in them, and which branches of the model each runs."""
    present = 0
    for micro_batch in micro_batches:
        for part in (micro_batch.text_ids, micro_batch.caption_ids, micro_batch.pixel_rows):
            present = 2 * present + (part is not None)
    return {
        "the_number_of_micro_batches": len(micro_batches),
        "the_number_of_images": sum(len(micro_batch.keys) for micro_batch in micro_batches),
        "the_branches_that_run": present,
    }


def derive_rng(purpose: str, seed: int, stage: int, step: int) -> Tensor:
    """The (seed, offset) of one purpose in one step: (hash of all four arguments, 0)."""
    digest = hashlib.sha256(f"{purpose} {seed} {stage} {step}".encode()).digest()
    return ops.random.make_rng(int.from_bytes(digest[:8], "little"))


def subsample(rows: Tensor, count: int, rng: Tensor, number: int, micro_batches: int) -> Tensor:
    """`count` / `micro_batches` of the candidate rows (int64) of micro-batch `number`, one from each of as many equal runs, ascending.

    One rng serves all micro-batches of a step; each reads its own part of it.
    """
    share = count // micro_batches
    if share >= len(rows):
        return rows
    u = ops.random.uniform((count,), rng)[number * share : (number + 1) * share].double()
    places = ((torch.arange(share, dtype=torch.float64) + u) * (len(rows) / share)).long()
    return rows[places.clamp(max=len(rows) - 1)]


class Step:
    """Computes the gradients of one optimizer step into the parameters' .grad."""

    def __init__(
        self,
        parallel: Parallel,
        objective: Objective,
        timer: Timer,
        *,
        bf16: bool,
        exact_contrastive: bool,
    ) -> None:
        self.parallel, self.model, self.ranks = parallel, parallel.model, parallel.ranks
        self.objective, self.timer = objective, timer
        self.bf16, self.exact_contrastive = bf16, exact_contrastive

    def __call__(
        self, micro_batches: Sequence[MicroBatch], measure: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Backward of this rank's micro-batches. Returns the losses' means over them (float32 scalars, not yet over ranks), and with
        `measure` the branches' gradients at the tokens: rec_grad_norm, und_grad_norm and grad_cosine."""
        count = len(micro_batches)
        contrastive = self._whole_contrastive(micro_batches) if self.exact_contrastive and count > 1 else None
        means: dict[str, Tensor] = {}
        measured: dict[str, float] = {}
        for number, micro_batch in enumerate(micro_batches):
            last = number == count - 1
            with self.parallel.backward(last):
                with _EncoderStates(self.model, enabled=measure and last) as encoder:
                    losses = self._forward(micro_batch, contrastive and contrastive.part(number, self.model))
                if measure and last:
                    with self.timer("measure"), self.parallel.measuring():
                        measured = self._branch_gradients(encoder.states, losses["rec"], losses["und"])
                with self.timer("backward"):
                    (losses["loss"] / count).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / count
        self.parallel.finish()
        return means, measured

    def update(self, optimizer: AdamW) -> None:
        """Changes the weights by the gradients of the last call."""
        optimizer.step()
        self.model.clamp_logit_scale()

    def autocast(self) -> Any:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16)

    def _forward(
        self, micro_batch: MicroBatch, contrastive: Callable[[ModelOutput], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Losses by name, with their graphs. contrastive: computes that part in place of this micro-batch's own."""
        config = self.objective.config
        with self.autocast(), self.timer("other forward"):
            outputs: ModelOutput = self.parallel.runner(
                micro_batch.latents, micro_batch.text_ids, micro_batch.caption_ids,
                sigma=micro_batch.sigma, rng=micro_batch.rng, decode=config.rec_weight > 0,
                decode_index=micro_batch.latent_rows, caption_index=micro_batch.caption_rows, text_index=micro_batch.text_index,
                detach=config.detached,
            )  # fmt: skip
            images_hat = None
            if micro_batch.pixel_rows is not None:
                with self.timer("vae decode"):
                    images_hat = self.model.decode_latents(outputs.latents_hat[micro_batch.pixel_rows])
            with self.timer("losses"):
                rows = slice(None) if micro_batch.latent_rows is None else micro_batch.latent_rows
                parts = self.objective.parts(
                    outputs, latents=micro_batch.latents[rows], images=micro_batch.images, images_hat=images_hat,
                    pairs=micro_batch.pairs, group=self.ranks.group, contrastive=contrastive is None,
                )  # fmt: skip
                if "caption" in parts and config.caption_reduction == "mean":
                    parts["caption"] = parts["caption"] * micro_batch.caption_share
                if contrastive is not None:
                    parts["contrastive"] = contrastive(outputs)
                return self.objective.combine(parts)

    def _whole_contrastive(self, micro_batches: Sequence[MicroBatch]) -> _WholeContrastive | None:
        """The contrastive loss over all micro-batches and its gradients; no graph of the towers is kept."""
        config = self.objective.config
        if config.contrastive_weight == 0 or config.und_weight == 0 or micro_batches[0].text_ids is None:
            return None
        model = self.model
        with torch.no_grad(), self.autocast(), self.timer("other forward"):
            features = [model.contrastive_features(m.latents, m.text_ids) for m in micro_batches]
        pooled, text = (torch.cat(side).requires_grad_() for side in zip(*features, strict=True))
        images, texts = ([len(feature) for feature in side] for side in zip(*features, strict=True))
        pairs, first_image = [], 0
        for micro_batch, count in zip(micro_batches, images, strict=True):
            own = torch.arange(count, device=pooled.device)[None] if micro_batch.pairs is None else micro_batch.pairs
            pairs.append(own + first_image)
            first_image += count
        scale = model.logit_scale.detach().exp().requires_grad_()
        bias = None if model.logit_bias is None else model.logit_bias.detach().clone().requires_grad_()
        with self.timer("losses"):
            loss = self.objective.contrastive(pooled, text, scale, bias, torch.cat(pairs, 1), self.ranks.group)
            leaves = [pooled, text, scale] + ([] if bias is None else [bias])
            by_pooled, by_text, *by_scalars = torch.autograd.grad(loss, leaves)
        # The loss of each micro-batch is divided by their number; the gradient of the whole must not be.
        count = len(micro_batches)
        return _WholeContrastive(
            loss.detach(), (count * by_pooled).split(images), (count * by_text).split(texts), tuple(by_scalars)
        )

    def _branch_gradients(self, states: Tensor, rec: Tensor, und: Tensor) -> dict[str, float]:
        """Norms of the two branches' gradients at the tokens of every rank's last micro-batch, and their cosine.

        The losses enter with the weights that they have in the sum; a branch without a loss has norm 0.
        """
        config, sides = self.objective.config, []
        for loss in (config.rec_weight * rec, config.und_weight * und):
            gradient = None
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, states, retain_graph=True, allow_unused=True)
            sides.append(torch.zeros_like(states) if gradient is None else gradient)
        a, b = (side.double().flatten() for side in sides)
        aa, bb, ab = self.ranks.total(torch.stack([a @ a, b @ b, a @ b]).cpu()).tolist()
        scale = 1.0 / self.ranks.world
        cosine = ab / (aa * bb) ** 0.5 if aa > 0 and bb > 0 else 0.0
        return {"rec_grad_norm": scale * aa**0.5, "und_grad_norm": scale * bb**0.5, "grad_cosine": cosine}


class _EncoderStates:
    """Within the block, captures the output of the encoder's last block: the tokens before any norm, where the two branches fork."""

    def __init__(self, model: OpenVision3, enabled: bool) -> None:
        self.transformer, self.enabled = model.encoder.transformer, enabled

    def __enter__(self) -> _EncoderStates:
        if self.enabled:
            self._handle = self.transformer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._handle.remove()

    def _keep(self, module: torch.nn.Module, inputs: Any, states: Tensor) -> None:
        self.states = states


@dataclass
class _WholeContrastive:
    """The contrastive loss over all of a rank's micro-batches, and its gradients at their features and at its scalars."""

    loss: Tensor
    by_pooled: Sequence[Tensor]
    by_text: Sequence[Tensor]
    by_scalars: tuple[Tensor, ...]
    """At exp(logit_scale), and at logit_bias where there is one."""

    def part(self, number: int, model: OpenVision3) -> Callable[[ModelOutput], Tensor]:
        """outputs of a micro-batch -> a scalar of the loss's value whose gradient is this micro-batch's share of the whole."""

        def contrastive(outputs: ModelOutput) -> Tensor:
            linear = (outputs.pooled * self.by_pooled[number]).sum() + (outputs.text * self.by_text[number]).sum()
            for scalar, gradient in zip((outputs.logit_scale, outputs.logit_bias), self.by_scalars, strict=False):
                linear = linear + scalar * gradient
            return self.loss + (linear - linear.detach())

        return contrastive
