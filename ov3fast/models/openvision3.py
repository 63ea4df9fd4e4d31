"""OpenVision 3 (arXiv 2601.15369): one encoder on frozen VAE latents, a reconstruction and an understanding branch.

    images -> [FrozenVAE] -> latents -> [ViTEncoder] -> tokens -> + noise -> [ViTDecoder] -> latents -> [FrozenVAE] -> images
                                                     -> pooled <-> feature <- [TextEncoder] <- text
                                                     -> tokens -> [CaptionDecoder] -> caption

Legend: B images, P texts, N tokens, D width, E embedding width, L ids.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ov3fast.data.preprocess import as_images
from ov3fast.io import atomic_folder

from . import noise, pretrained
from .config import VERSIONS, OpenVision3Config, versions
from .text import CaptionDecoder, TextEncoder
from .tokenizer import CONFIG_FILE, FILE, Tokenizer, get_tokenizer, load_tokenizer
from .vae import FrozenVAE, check_convention
from .vit import ViTDecoder, ViTEncoder

if TYPE_CHECKING:
    from ov3fast.data.preprocess import ImageLike

WEIGHTS_FILE = "model.safetensors"
WEIGHT_FILES = (WEIGHTS_FILE, "pytorch_model.bin")
"""What from_pretrained looks for, in this order; save_pretrained writes the first."""
PARTS = ("encoder", "decoder", "text", "captioner")


class ModelOutput(NamedTuple):
    """What the losses need. A part that was not asked for is None."""

    pooled: Tensor
    """[B, E], not normalised."""
    tokens: Tensor
    """[B, N, D], clean."""
    text: Tensor | None
    """[P, E], not normalised."""
    latents_hat: Tensor | None
    """[B', C, h, w] of the images that decode_index chose."""
    caption_hidden: Tensor | None
    """[B'', T, D'] of the images that caption_index chose."""
    caption_labels: Tensor | None
    """[B'', T] int64, -100 where nothing is to be predicted."""
    caption_weight: Tensor | None
    """[V, D'], the caption head: loss = ops.linear_cross_entropy(caption_hidden, caption_weight, caption_labels)."""
    logit_scale: Tensor
    """Scalar, already exponentiated."""
    logit_bias: Tensor | None
    """Scalar, only with the sigmoid loss."""


class OpenVision3(nn.Module):
    """The whole model. The VAE is attached to its encoder and no part of parameters or state dict: it is frozen and has its own file.

    vae: a FrozenVAE, or None: then config.vae is loaded when an image is first encoded or decoded. tokenizer: None takes
    config.tokenizer's (WordPiece only; CLIP's needs its vocabulary file).
    """

    def __init__(self, config: OpenVision3Config, vae: FrozenVAE | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.encoder = ViTEncoder(vision, config.latent_convention)
        self.encoder.vae_source = (config.vae, config.vae_subfolder)
        self.decoder = ViTDecoder(config.decoder, vision.width, vision.in_channels, vision.patch_size)
        self.text = TextEncoder(config.text, vision.embed_dim)
        self.captioner = CaptionDecoder(config.caption, vision.width, config.text.width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale_init)))
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias_init)) if config.contrastive == "sigmoid" else None
        self._tokenizer = None if tokenizer is None else self._fitting(tokenizer)
        self.set_vae(vae)

    # Training

    def forward(
        self,
        latents: Tensor,
        text_ids: Tensor | None = None,
        caption_ids: Tensor | None = None,
        *,
        sigma: Tensor | None = None,
        rng: Tensor | None = None,
        decode: bool = True,
        decode_index: Tensor | None = None,
        caption_index: Tensor | None = None,
        text_index: Tensor | None = None,
        detach: str | None = None,
    ) -> ModelOutput:
        """latents [B, C, h, w] in the model's convention; text_ids [P, L]; caption_ids [B, L'], a row per image.

        rng: (seed, offset) of this step; with it the decoder's input gets noise, sigma ~ U[0, tau] per instance unless sigma
        [B'] is given, and the captioner's share of tokens is drawn. Without rng nothing is random.
        decode_index, caption_index: int64 rows of the images that the decoder and the captioner see; None is all.
        text_index: int64 [B], each image's row of text_ids, read only with the caption prefix of text; None is the same row.
        decode=False leaves the decoder out, text_ids=None the text encoder, caption_ids=None the captioner.
        detach: branch, "rec" or "und", from which no gradient reaches the encoder's blocks (ObjectiveConfig.detached).
        """
        pooled, tokens = self.encoder(latents, post_ln=self._post_ln, detach_pooled=detach == "und")
        rec_tokens, und_tokens = (tokens.detach() if detach == branch else tokens for branch in ("rec", "und"))
        feature = text_tokens = latents_hat = hidden = labels = weight = None
        if text_ids is not None:
            feature, text_tokens = self.text(text_ids, return_tokens=True)
        if decode:
            patch = self.config.vision.patch_size
            chosen = rec_tokens if decode_index is None else rec_tokens[decode_index]
            if sigma is None and rng is not None and self.config.tau > 0:
                sigma = noise.sample_sigma(chosen.shape[0], self.config.tau, noise.derive_rng(rng, noise.SIGMA))
                sigma = sigma.to(chosen.device)
            latents_hat = self.decoder(chosen, (latents.shape[2] // patch, latents.shape[3] // patch), sigma, rng)
        if caption_ids is not None:
            if caption_ids.shape[0] != tokens.shape[0]:
                raise ValueError(
                    f"OpenVision3: caption_ids must have a row per image, got {caption_ids.shape[0]} rows for {tokens.shape[0]} images"
                )
            rows = slice(None) if caption_index is None else caption_index
            if self.config.caption.text_prefix:
                if text_tokens is None:
                    raise ValueError("OpenVision3: captions with text_prefix need text_ids")
                text_tokens = text_tokens[rows if text_index is None else text_index[rows]]
            hidden, labels = self.captioner(
                und_tokens[rows], caption_ids[rows], text_tokens if self.config.caption.text_prefix else None, rng
            )
            # A view: FSDP registers hooks on the model's outputs, which would pile up on a parameter step by step.
            weight = self.captioner.head.weight.view_as(self.captioner.head.weight)
        bias = None if self.logit_bias is None else self.logit_bias.view(())
        return ModelOutput(pooled, tokens, feature, latents_hat, hidden, labels, weight, self.logit_scale.exp(), bias)

    def contrastive_features(self, latents: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
        """latents and text_ids as `forward` -> pooled [B, E] and text [P, E], not normalised: what the contrastive loss sees, no more."""
        return self.encoder(latents, post_ln=self._post_ln)[0], self.text(text_ids)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps exp(logit_scale) at or below config.logit_scale_max; called after each update of the weights."""
        if self.config.logit_scale_max is not None:
            self.logit_scale.clamp_(max=math.log(self.config.logit_scale_max))

    def set_activation_checkpointing(self, enabled: bool, recompute: str = "block") -> None:
        """Recompute each block of the four towers, or its MLP alone (recompute="mlp"), in the backward pass in place of keeping its activations."""
        for part in PARTS:
            getattr(self, part).set_activation_checkpointing(enabled, recompute)

    # Use

    def encode(self, images: Tensor | ImageLike, *, rng: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1], on any device and of any floating dtype -> (pooled [B, E], tokens [B, N, D]).

        Also accepts what `ov3fast.preprocess` does, resized to the model's image_size: Pillow images, paths, uint8 arrays and tensors, lists.

        The VAE's moments go straight into the encoder's patch embedding; the latents are never materialised. They are sampled with rng =
        (seed, offset) where config.posterior is "sample"; without rng their mean is taken. Sides are multiples of 8 * patch_size.
        Latents in place of images are deprecated: give them to `encode_latents`.
        """
        return self._encode(images, "encode", rng)

    def encode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, C, h, w] in the model's convention, on any device and of any floating dtype -> as `encode`."""
        return cast("tuple[Tensor, Tensor]", self.encoder.encode_latents(latents, post_ln=self._post_ln))

    def encode_moments(self, moments: Tensor, *, rng: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The VAE's moments [B, 2C, h, w] of `encode_to_moments` -> as `encode`; sampled with rng, else their mean."""
        return cast("tuple[Tensor, Tensor]", self.encoder.encode_moments(moments, rng=rng, post_ln=self._post_ln))

    def encode_image(self, images: Tensor | ImageLike, normalize: bool = False) -> Tensor:
        """Images, as `encode` -> pooled [B, E]."""
        pooled, _ = self._encode(images, "encode_image")
        return nn.functional.normalize(pooled.float(), dim=-1) if normalize else pooled

    def encode_text(self, texts: Tensor | Sequence[str], normalize: bool = False) -> Tensor:
        """Ids [B, L] int64, or a list of strings -> feature [B, E]."""
        feature = self.text(self.text_ids(texts))
        return nn.functional.normalize(feature.float(), dim=-1) if normalize else feature

    def decode(
        self, tokens: Tensor, grid: tuple[int, int] | None = None, sigma: Tensor | None = None, rng: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, N, D] -> latents [B, C, h, w]; grid None takes a square. sigma [B] with rng adds noise first."""
        if grid is None:
            side = math.isqrt(tokens.shape[1])
            if side * side != tokens.shape[1]:
                raise ValueError(f"OpenVision3.decode: {tokens.shape[1]} tokens are no square; give grid (h, w)")
            grid = (side, side)
        latents: Tensor = self.decoder(tokens, grid, sigma, rng)
        return latents

    def decode_latents(self, latents: Tensor, convention: str | None = None) -> Tensor:
        """Latents in the model's convention -> images [B, 3, H, W], about [-1, 1]; differentiable in the latents.

        convention, where the caller knows it, is checked against the model's: ValueError if they differ.
        """
        if convention is not None:
            check_convention(convention, self.config.latent_convention)
        return self.get_vae().decode(latents, self.config.latent_convention)

    def encode_to_moments(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> the VAE's moments [B, 2C, h, w] (mean and log-variance), in its dtype."""
        return self.encoder.encode_to_moments(images)

    def encode_to_latents(self, images: Tensor, rng: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] in the model's convention and the VAE's dtype.

        For what needs the latents themselves, such as the reconstruction loss; `encode` needs none. With rng and config.posterior
        "sample" they are drawn from the posterior, else they are its mean.
        """
        posterior = self.config.posterior if rng is not None else "mean"
        rng = None if rng is None else noise.derive_rng(rng, noise.POSTERIOR).to(self.device)
        return self.get_vae().from_moments(self.encode_to_moments(images), posterior, self.config.latent_convention, rng)

    def latents(self, images: Tensor, rng: Tensor | None = None) -> Tensor:
        """Deprecated name of `encode_to_latents`."""
        warnings.warn("OpenVision3.latents is now named encode_to_latents", DeprecationWarning, stacklevel=2)
        return self.encode_to_latents(images, rng)

    @torch.no_grad()
    def reconstruct(self, images: Tensor | ImageLike) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], or as `encode` -> their reconstruction, same shape, clamped to [-1, 1]; no noise."""
        moments = self.encode_to_moments(as_images(images, self.config.vision.image_size))
        _, tokens = self.encode_moments(moments)
        patch = self.config.vision.patch_size
        latents_hat = self.decoder(tokens, (moments.shape[2] // patch, moments.shape[3] // patch))
        return self.decode_latents(latents_hat).clamp(-1, 1)

    @torch.no_grad()
    def caption(
        self, images: Tensor | ImageLike, beams: int = 1, max_length: int | None = None, texts: Sequence[str] | None = None
    ) -> list[str]:
        """Images, as `encode` -> a caption each. texts: the known alt texts, for a text_prefix model ("" if none)."""
        _, tokens = self._encode(images, "caption")
        text_tokens = None
        if self.config.caption.text_prefix:
            _, text_tokens = self.text(self.text_ids(texts or [""] * len(tokens)), return_tokens=True)
        ids = self.captioner.generate(tokens, max_length, beams, text_tokens)
        return [self.tokenizer.decode(row) for row in ids]

    def text_ids(self, texts: Tensor | Sequence[str]) -> Tensor:
        """Strings -> ids [B, context_length] on the model's device, laid out for the text encoder; ids pass through."""
        if isinstance(texts, Tensor):
            return texts
        return self.tokenizer(texts, self.config.text.context_length, kind="text").to(self.device)

    def caption_ids(self, texts: Sequence[str]) -> Tensor:
        """Strings -> ids [B, caption length] on the model's device, laid out for the captioner."""
        return self.tokenizer(texts, self.config.caption.length, kind="caption").to(self.device)

    # Parts

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; the config's default where none was given."""
        if self._tokenizer is None:
            self._tokenizer = self._fitting(get_tokenizer(self.config.tokenizer))
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = self._fitting(tokenizer)

    @property
    def vae(self) -> FrozenVAE | None:
        """The attached VAE, or None while none is given or loaded."""
        return self.encoder.vae

    def set_vae(self, vae: FrozenVAE | None) -> None:
        """Attach a frozen VAE; raises ValueError if its channels, its stride or its latent convention differ."""
        self.encoder.set_vae(vae)

    def get_vae(self) -> FrozenVAE:
        """The attached VAE; config.vae is loaded on first need."""
        return self.encoder.get_vae()

    def set_image_size(self, image_size: int) -> None:
        """Another config.vision.image_size, in pixels: `ViTEncoder.set_image_size`."""
        self.encoder.set_image_size(image_size)
        self.config = dataclasses.replace(self.config, vision=self.encoder.config)

    def parameter_counts(self) -> dict[str, int]:
        """Part -> number of values: encoder, decoder, text, captioner, other, total, and vae (frozen) where one is there."""
        counts = {part: sum(p.numel() for p in getattr(self, part).parameters()) for part in PARTS}
        total = sum(p.numel() for p in self.parameters())
        counts |= {"other": total - sum(counts.values()), "total": total}
        if self.vae is not None:
            counts["vae"] = sum(p.numel() for p in self.vae.parameters())
        return counts

    # Files

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        vae: FrozenVAE | str | Path | None = None,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        image_size: int | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> OpenVision3:
        """A folder or hub id that save_pretrained wrote, or a training run's folder; in eval mode. vae: a FrozenVAE, its folder or id, or
        None: config.vae, which stays in float32 whatever the model's dtype.

        dtype: default float32, "auto" the file's own. image_size: pixels, where other than the config's. variant: of the weights, "fp16"
        for model.fp16.safetensors. The rest is huggingface_hub's. The weights are in memory once. FileNotFoundError or ValueError names
        what is missing, unexpected or misshapen.
        """
        what = f"OpenVision3.from_pretrained({str(path)!r})"
        wide = pretrained.as_dtype(dtype, what)
        device = pretrained.check_device(device, what)
        hub = pretrained.Hub(revision, token, cache_dir, local_files_only)
        files = ["config.json", FILE, CONFIG_FILE, *pretrained.weight_patterns(WEIGHT_FILES, variant)]
        folder = pretrained.model_folder(pretrained.resolve(path, what, files, hub), what)
        config = OpenVision3Config.from_dict(pretrained.read_json(folder / "config.json", what))
        tokenizer = load_tokenizer(folder) if (folder / CONFIG_FILE).is_file() else None
        weights = pretrained.find_weights(folder, WEIGHT_FILES, what, variant)
        with pretrained.without_values():
            model = cls(config, tokenizer=tokenizer)
        pretrained.load_state(model, pretrained.read_tensors(weights, what, wide, device), what, assign=True)
        if image_size is not None:
            model.set_image_size(image_size)
        model.encoder.vae_hub = pretrained.Hub(None, token, cache_dir, local_files_only)
        if vae is not None:
            model.set_vae(vae if isinstance(vae, FrozenVAE) else FrozenVAE.from_pretrained(vae, hub=model.encoder.vae_hub))
        return model.to(device).eval()

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes config.json, model.safetensors and the tokenizer to the folder `path`, all or nothing. The VAE stays out.

        state_dict: weights to write in place of the model's own.
        """
        with atomic_folder(path, former=(FILE, CONFIG_FILE)) as folder:
            text = json.dumps({**self.config.to_dict(), VERSIONS: versions()}, indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
            pretrained.write_tensors(self.state_dict() if state_dict is None else state_dict, folder / WEIGHTS_FILE)
            if self._tokenizer is not None or self.config.tokenizer == "wordpiece":
                self.tokenizer.save(folder)

    @property
    def _post_ln(self) -> bool:
        return self.config.tokens == "post_ln"

    def _encode(self, images: Tensor | ImageLike, method: str, rng: Tensor | None = None) -> tuple[Tensor, Tensor]:
        channels = self.config.vision.in_channels
        if isinstance(images, Tensor) and channels != 3 and images.ndim == 4 and images.shape[1] == channels:
            message = f"OpenVision3.{method} takes images; latents are deprecated here, see encode_latents"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
            return self.encode_latents(images)
        rng = rng if self.config.posterior == "sample" else None
        return cast("tuple[Tensor, Tensor]", self.encoder.encode(images, rng=rng, post_ln=self._post_ln))

    def _fitting(self, tokenizer: Tokenizer) -> Tokenizer:
        rows = min(self.config.text.vocab_size, self.config.caption.vocab_size)
        if tokenizer.vocab_size > rows:
            raise ValueError(
                f"OpenVision3: the tokenizer has {tokenizer.vocab_size} ids, the embeddings {rows} rows; see OpenVision3Config.for_tokenizer"
            )
        caption = self.config.caption
        for name in ("pad_id", "bos_id", "eos_id"):
            if getattr(tokenizer, name) != getattr(caption, name):
                raise ValueError(
                    f"OpenVision3: the tokenizer's {name} is {getattr(tokenizer, name)}, the config's {getattr(caption, name)}; "
                    "see OpenVision3Config.for_tokenizer"
                )
        return tokenizer

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would take a VAE for a submodule.
        if name == "vae":
            self.set_vae(value)
        else:
            super().__setattr__(name, value)
