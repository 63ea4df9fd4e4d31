"""One optimizer step's gradients: slices of the global batch -> forward -> losses -> backward.

A global batch is cut into S = world * accumulate slices; rank r works through slices r * accumulate ... in turn. Everything
that is random in a slice (noise, its sigma, which images are decoded or captioned) is a function of (seed, stage, step, place in the
global batch), so a step can be computed again, and runs with the same S are the same run however S is split.

The loss of S slices is that of the whole batch: means over images are averaged (slices have one size), the caption loss is
weighted by each slice's share of the tokens, and the contrastive loss is computed over all slices (`contrastive_over="batch"`): the
features are computed once without a graph, the loss and its gradient at the features follow, and the second pass sends that
gradient into the towers (GradCache, Gao et al. 2021, arXiv 2101.06983).

Legend: m images of a slice, T texts, V views, C latent channels, N tokens, D width, E embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ov3fast import ops
from ov3fast.losses import Objective
from ov3fast.models.openvision3 import ModelOutput, OpenVision3
from ov3fast.training.distributed import Ranks
from ov3fast.training.timing import Timer


@dataclass
class Slice:
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
    caption_share: float = 1.0
    """Caption tokens of this slice over the mean of all slices."""

    @property
    def text_index(self) -> Tensor | None:
        """[m]: each image's text; 0 for images without one."""
        if self.pairs is None:
            return None
        index = torch.zeros(len(self.keys), dtype=torch.int64, device=self.pairs.device)
        index[self.pairs.flatten()] = torch.arange(self.pairs.shape[1], device=self.pairs.device).repeat(len(self.pairs))
        return index


def stream(purpose: str, seed: int, stage: int, step: int) -> Tensor:
    """The rng of one purpose in one step: (hash of all four, 0)."""
    digest = hashlib.sha256(f"{purpose} {seed} {stage} {step}".encode()).digest()
    return ops.random.make_rng(int.from_bytes(digest[:8], "little"))


def choose(rows: Tensor, count: int, rng: Tensor, slice_number: int, slices: int) -> Tensor:
    """`count` / `slices` of this slice's candidate rows (int64), one from each of as many equal runs of them, ascending.

    One rng serves all slices of a step; each reads its own part of it.
    """
    share = count // slices
    if share >= len(rows):
        return rows
    u = ops.random.uniform((count,), rng)[slice_number * share : (slice_number + 1) * share].double()
    places = ((torch.arange(share, dtype=torch.float64) + u) * (len(rows) / share)).long()
    return rows[places.clamp(max=len(rows) - 1)]


class Step:
    """Computes the gradients of one optimizer step into the parameters' .grad."""

    def __init__(
        self,
        model: OpenVision3,
        runner: torch.nn.Module,
        objective: Objective,
        ranks: Ranks,
        timer: Timer,
        *,
        bf16: bool,
        exact_contrastive: bool,
    ) -> None:
        """model: the bare model; runner: what is called (the model, or DistributedDataParallel of it)."""
        self.model, self.runner, self.objective, self.ranks, self.timer = model, runner, objective, ranks, timer
        self.bf16, self.exact_contrastive = bf16, exact_contrastive

    def __call__(self, slices: Sequence[Slice], measure: bool = False) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Backward of this rank's slices. Returns the losses' means over them (float32 scalars, not yet over ranks), and with
        `measure` the branches' gradients at the tokens: rec_grad_norm, und_grad_norm and grad_cosine."""
        count = len(slices)
        shared = self._contrastive_gradients(slices) if self.exact_contrastive and count > 1 else None
        sums: dict[str, Tensor] = {}
        measured: dict[str, float] = {}
        for number, piece in enumerate(slices):
            last = number == count - 1
            # DistributedDataParallel exchanges gradients in the backward pass; once a step is enough.
            hold = self.runner.no_sync() if self.ranks.group is not None and not last else nullcontext()
            with hold:
                with _Hidden(self.model, enabled=measure and last) as hidden:
                    losses, rec, und = self._forward(piece, None if shared is None else shared.slices[number])
                if shared is not None and last:
                    losses["contrastive"] = shared.loss * count
                    und = und + count * shared.to_scale(self.model)
                if measure and last:
                    with self.timer("measure"):
                        measured = self._branch_gradients(hidden.states, rec, und)
                with self.timer("backward"):
                    ((rec + und) / count).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / count
        if shared is not None:
            config = self.objective.config
            sums["und"] = sums["und"] + config.contrastive_weight * shared.loss
            sums["loss"] = sums["loss"] + config.und_weight * config.contrastive_weight * shared.loss
        return sums, measured

    def autocast(self) -> Any:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16)

    def _forward(self, piece: Slice, feature_gradients: tuple[Tensor, Tensor] | None) -> tuple[dict, Tensor, Tensor]:
        """Losses by name, and the two branches' weighted losses (with their graphs)."""
        config = self.objective.config
        with self.autocast(), self.timer("other forward"):
            outputs: ModelOutput = self.runner(
                piece.latents, piece.text_ids, piece.caption_ids, sigma=piece.sigma, rng=piece.rng,
                decode=config.rec_weight > 0, decode_index=piece.latent_rows, caption_index=piece.caption_rows, text_index=piece.text_index,
            )  # fmt: skip
            images_hat = None
            if piece.pixel_rows is not None:
                with self.timer("vae decode"):
                    images_hat = self.model.decode_latents(outputs.latents_hat[piece.pixel_rows])
            with self.timer("losses"):
                own = outputs if feature_gradients is None else outputs._replace(text=None)
                latents = piece.latents if piece.latent_rows is None else piece.latents[piece.latent_rows]
                losses = self.objective(
                    own, latents=latents, images=piece.images, images_hat=images_hat, pairs=piece.pairs,
                    group=self.ranks.group,
                )  # fmt: skip
                if "caption" in losses and config.caption_reduction == "mean" and piece.caption_share != 1.0:
                    extra = config.caption_weight * (piece.caption_share - 1.0) * losses["caption"]
                    losses["und"] = losses["und"] + extra
                    losses["loss"] = losses["loss"] + config.und_weight * extra
                    losses["caption"] = losses["caption"] * piece.caption_share
                rec, und = config.rec_weight * losses["rec"], config.und_weight * losses["und"]
                if feature_gradients is not None:
                    pooled, text = feature_gradients
                    und = und + (outputs.pooled * pooled).sum() + (outputs.text * text).sum()
        return losses, rec, und

    def _contrastive_gradients(self, slices: Sequence[Slice]) -> _Shared | None:
        """The contrastive loss over all slices, and its gradient at the features and the scale; no graph of the towers is kept."""
        config = self.objective.config
        if config.contrastive_weight == 0 or config.und_weight == 0 or slices[0].text_ids is None:
            return None
        model = self.model
        with torch.no_grad(), self.autocast(), self.timer("other forward"):
            features = [(model.encode_latents(piece.latents)[0], model.text(piece.text_ids)) for piece in slices]
        pooled, text = (torch.cat(side).requires_grad_() for side in zip(*features, strict=True))
        pairs, row = [], 0
        for piece in slices:
            own = piece.pairs if piece.pairs is not None else torch.arange(len(piece.keys), device=pooled.device)[None]
            pairs.append(own + row)
            row += len(piece.keys)
        scale = model.logit_scale.detach().exp().requires_grad_()
        bias = None if model.logit_bias is None else model.logit_bias.detach().clone().requires_grad_()
        with self.timer("losses"):
            whole = ModelOutput(pooled, pooled, text, None, None, None, None, scale, bias)
            loss = self.objective(whole, pairs=torch.cat(pairs, 1), group=self.ranks.group)["contrastive"]
            leaves = [pooled, text, scale] + ([] if bias is None else [bias])
            weight = config.und_weight * config.contrastive_weight
            gradients = torch.autograd.grad(weight * loss, leaves)
        # Each slice's loss is divided by their number later; the gradient of the whole must not be.
        count = len(slices)
        by_slice = zip(
            (count * gradients[0]).split([len(piece.keys) for piece in slices]),
            (count * gradients[1]).split([len(piece.text_ids) for piece in slices]),
            strict=True,
        )
        return _Shared(loss.detach(), list(by_slice), gradients[2], None if bias is None else gradients[3])

    def _branch_gradients(self, states: Tensor, rec: Tensor, und: Tensor) -> dict[str, float]:
        """Norms of the two branches' gradients at the tokens of the last slice of every rank, and their cosine.

        The losses are the weighted ones, as they enter the sum; a branch without a loss has norm 0.
        """
        sides = []
        for loss in (rec, und):
            gradient = None
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, states, retain_graph=True, allow_unused=True)
            sides.append(torch.zeros_like(states) if gradient is None else gradient)
        a, b = (side.double().flatten() for side in sides)
        aa, bb, ab = self.ranks.total(torch.stack([a @ a, b @ b, a @ b]).cpu()).tolist()
        scale = 1.0 / self.ranks.world
        cosine = ab / (aa * bb) ** 0.5 if aa > 0 and bb > 0 else 0.0
        return {"rec_grad_norm": scale * aa**0.5, "und_grad_norm": scale * bb**0.5, "grad_cosine": cosine}


class _Hidden:
    """Within the block, keeps what the encoder's last block gives: the tokens before any norm, from which both branches part."""

    def __init__(self, model: OpenVision3, enabled: bool) -> None:
        self.transformer, self.enabled = model.encoder.transformer, enabled

    def __enter__(self) -> _Hidden:
        if self.enabled:
            self._handle = self.transformer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._handle.remove()

    def _keep(self, module: torch.nn.Module, inputs: Any, states: Tensor) -> None:
        self.states = states


@dataclass
class _Shared:
    """The contrastive loss of all of a rank's slices and its (weighted) gradients."""

    loss: Tensor
    slices: list[tuple[Tensor, Tensor]]
    scale: Tensor
    bias: Tensor | None

    def to_scale(self, model: OpenVision3) -> Tensor:
        """A term whose gradient at logit_scale and logit_bias is the loss's."""
        term = model.logit_scale.exp() * self.scale
        return term if self.bias is None else term + model.logit_bias * self.bias
