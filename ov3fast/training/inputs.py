"""A stage's batches, ready for the model: latents, ids, noise, and the images that the pixel losses see."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ov3fast import ops
from ov3fast.data import latent_shards
from ov3fast.data.loader import Batch, Loader
from ov3fast.data.skips import SkipCounter
from ov3fast.data.store import SampleStore
from ov3fast.losses import ObjectiveConfig
from ov3fast.models import noise
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.recipes.config import Recipe
from ov3fast.training import build, latents
from ov3fast.training.distributed import Ranks
from ov3fast.training.step import MicroBatch, derive_rng, subsample
from ov3fast.training.timing import Timer


class Inputs:
    """next() gives this rank's micro-batches of the next step; the sequence is a function of the recipe, the stage and the step alone.

    cursors: units drawn from each source before this stage. A cache of latents, where the recipe asks for one, is filled by prepare().
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: int,
        objective: ObjectiveConfig,
        model: OpenVision3,
        store: SampleStore,
        ranks: Ranks,
        timer: Timer,
        cursors: tuple[int, ...] | None,
    ) -> None:
        self.recipe, self.number, self.stage = recipe, stage, recipe.stages[stage]
        self.objective, self.model, self.store, self.ranks, self.timer = objective, model, store, ranks, timer
        self.micro_batches = ranks.world * recipe.accumulate
        self.loaders = [
            Loader(
                store, image_size=self.stage.image_size, batch_size=self.stage.batch_size,
                rank=ranks.rank * recipe.accumulate + number, world=self.micro_batches, cursors=cursors,
            )
            for number in range(recipe.accumulate)
        ]  # fmt: skip
        self.cache: latents.LatentCache | None = None
        self._batches: list[Iterator[Batch]] = []

    @property
    def skips(self) -> SkipCounter:
        return self.loaders[0].skips

    def cursors(self, step: int) -> tuple[int, ...]:
        """Units drawn from each source before this step of the stage."""
        return self.loaders[0].cursors(step)

    def prepare(self, progress: Callable[[int, int], None]) -> None:
        """Opens data.latents; or fills the cache of latents, or reads the one that run_dir holds. progress(images done, of)."""
        recipe, vae, config, loader = self.recipe, self.model.get_vae(), self.recipe.model, self.loaders[0]
        if recipe.data.latents is not None:
            size = self.stage.image_size
            kept = latent_shards.LatentShards(recipe.data.latents, size)
            given = build.vae_facts(vae, size, config.latent_convention, recipe.vae_batch)
            kept.check(latent_shards.facts(recipe.data, self.store, size, **given))
            for loader in self.loaders:
                loader.latents = kept
        if not recipe.cache_latents:
            return
        path = recipe.run_dir / "latents" / f"{self.stage.image_size}.safetensors"
        key = build.latents_key(recipe, self.stage, self.store, vae)
        self.cache = latents.load(path, key)
        # No rank may write before all have looked.
        self.ranks.wait()
        if self.cache is not None:
            return
        with self.timer("latent cache"):
            self.cache = latents.fill(
                loader.usable(), self.store.n, recipe.data.variants, loader.pixels,
                vae.moments if config.posterior == "sample" else lambda images: vae.encode(images, "mean", config.latent_convention),
                torch.float32 if recipe.latent_dtype == "fp32" else torch.bfloat16, self.ranks, progress,
            )  # fmt: skip
        if recipe.save_latents and self.ranks.first:
            latents.save(self.cache, path, key)

    def start(self, step: int, stop: int | None) -> None:
        """Makes the next call of next() return this step of the stage."""
        self._batches = [
            loader.batches(step, stop, pixels=self.cache is None and loader.latents is None) for loader in self.loaders
        ]

    def next(self, step: int) -> tuple[list[MicroBatch], np.ndarray]:
        """This rank's micro-batches, and the numbers of the samples of all ranks in their order."""
        with self.timer("data"):
            batches = [next(batches) for batches in self._batches]
        micro_batches = [self._micro_batch(batch, step, number) for number, batch in enumerate(batches)]
        if self.micro_batches > 1 and self.objective.caption_reduction == "mean" and micro_batches[0].caption_ids is not None:
            labels = [self.model.captioner.labels(m.caption_ids[m.caption_rows]) for m in micro_batches]
            counts = [float((own >= 0).sum()) for own in labels]
            mean = float(self.ranks.total(torch.tensor(sum(counts), dtype=torch.float64))) / self.micro_batches
            for micro_batch, count in zip(micro_batches, counts, strict=True):
                micro_batch.caption_share = count / mean if mean else 1.0
        return micro_batches, batches[0].planned

    def _micro_batch(self, batch: Batch, step: int, number: int) -> MicroBatch:
        device, config = self.ranks.device, self.recipe.model
        place, size = self.ranks.rank * self.recipe.accumulate + number, len(batch.keys)

        def rng(purpose: str) -> Tensor:
            return derive_rng(purpose, self.recipe.seed, self.number, step)

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        with self.timer("data"):
            text_ids = self._text_ids(batch)
            caption_ids, caption_rows = self._captions(batch, place, rng("captions"))
            latent_rows = self._latent_rows(size, place, rng("latents"))
            pixel_rows, images = self._pixels(batch, place, rng("pixels"), latent_rows)
        values = self._latents(batch, rng("posterior"), place * size)
        tokens = values.shape[2] * values.shape[3] // config.vision.patch_size**2
        sigma = None
        if config.tau > 0:
            whole = noise.sample_sigma(self.stage.batch_size, config.tau, rng("sigma"))
            sigma = whole[place * size : (place + 1) * size]
            sigma = sigma if latent_rows is None else sigma[latent_rows]
        decoded = size if latent_rows is None else len(latent_rows)
        return MicroBatch(
            keys=batch.keys,
            latents=values,
            text_ids=text_ids,
            pairs=move(batch.pairs) if text_ids is not None else None,
            caption_ids=caption_ids,
            caption_rows=move(caption_rows),
            latent_rows=move(latent_rows),
            pixel_rows=move(pixel_rows),
            images=move(images),
            sigma=move(sigma),
            rng=move(ops.random.advance(rng("noise"), place * decoded * tokens * config.vision.width)),
        )

    def _text_ids(self, batch: Batch) -> Tensor | None:
        contrasted = self.objective.contrastive_weight > 0 and self.objective.und_weight > 0
        if not batch.text or not (contrasted or self.recipe.model.caption.text_prefix):
            return None
        return self.model.text_ids(batch.text)

    def _captions(self, batch: Batch, place: int, rng: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(ids [m, L], rows): the images that the captioner sees, all or a share of those that have a caption."""
        limit, config = self.stage.caption_images, self.recipe.model.caption
        rows = torch.tensor([row for row, caption in enumerate(batch.captions) if caption], dtype=torch.int64)
        if not len(rows) or limit == 0 or self.objective.caption_weight == 0 or self.objective.und_weight == 0:
            return None, None
        if limit is not None:
            rows = subsample(rows, limit, rng, place, self.micro_batches)
        ids = torch.full((len(batch.keys), config.length), config.pad_id, dtype=torch.int64, device=self.ranks.device)
        ids[rows] = self.model.caption_ids([batch.captions[row] for row in rows.tolist()])
        return ids, rows

    def _latent_rows(self, size: int, place: int, rng: Tensor) -> Tensor | None:
        """The images that the reconstruction branch sees; None: all."""
        limit = self.stage.latent_images
        return None if limit is None else subsample(torch.arange(size), limit, rng, place, self.micro_batches)

    def _pixels(self, batch: Batch, place: int, rng: Tensor, latent_rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(rows among the reconstructed images, images [len(rows), 3, S, S]): what the pixel losses see."""
        if not self.objective.needs_pixels:
            return None, None
        candidates = torch.arange(len(batch.keys)) if latent_rows is None else latent_rows
        rows, limit = torch.arange(len(candidates)), self.stage.pixel_images
        if limit is not None:
            rows = subsample(rows, limit, rng, place, self.micro_batches)
        chosen = candidates[rows]
        if batch.images is None:
            return rows, self.loaders[0].pixels(batch.index[chosen], batch.variant[chosen])
        return rows, batch.images[chosen]

    def _latents(self, batch: Batch, rng: Tensor, first: int) -> Tensor:
        """[m, C, h, w] float32 in the model's convention; `first` is the micro-batch's first image in the global batch.

        Training needs the latents themselves, as the target of the reconstruction loss, so they are made once, here, and the encoder
        takes them too (inference gives it the VAE's moments).
        """
        device, vae, config = self.ranks.device, self.model.get_vae(), self.recipe.model
        sample = config.posterior == "sample"
        with self.timer("vae encode"):
            if self.cache is not None and not sample:
                return self.cache(batch.index, batch.variant).to(device)
            if self.cache is not None:
                moments = self.cache(batch.index, batch.variant).to(device)
            elif batch.moments is not None:
                moments = batch.moments.to(device, non_blocking=True)
            else:
                moments = latent_shards.in_full_batches(vae.moments, batch.images.to(device), self.recipe.vae_batch)
            if not sample:
                return vae.from_moments(moments, "mean", config.latent_convention).float()
            rng = ops.random.advance(rng, first * moments[0].numel() // 2).to(device)
            return vae.from_moments(moments.float(), "sample", config.latent_convention, rng)
