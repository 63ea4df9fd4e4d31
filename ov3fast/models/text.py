"""The two text towers: ids -> feature (TextEncoder), image tokens -> caption (CaptionDecoder).

Architecture and initialisation: official repository UCSC-VLAA/OpenVision, src/models/text_transformer.py, text_decoder.py (OpenVision 1)
and text_decoder_v2.py (OpenVision 2). Tanh GELU, LayerNorm eps 1e-6. The OpenVision 3 paper does not say which decoder it uses.

Legend: B batch, L ids, N image tokens, P prefix length, T targets, D width, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import noise
from .config import CaptionConfig, TextConfig
from .generation import Step, search
from .transformer import KeyValueCache, LayerNorm, Linear, Transformer, init_normal

IGNORE = -100
"""Label that a loss leaves out."""


class TextEncoder(nn.Module):
    """Ids [B, L] -> feature [B, E]: bidirectional, learned positions, pooled at one position, norm, bias-free head.

    Padding is not masked, as in the official code; with pool "last" the text is read off at the last position ([CLS]).
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config.width, config.depth, config.heads, config.mlp_dim, "gelu_tanh")
        self.norm = LayerNorm(config.width)
        self.head = Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        init_normal(self.transformer, config.residual_init)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(self, ids: Tensor, return_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """ids [B, L] int64, L <= context_length -> feature [B, E], or (feature, normed tokens [B, L, D])."""
        _check_ids("TextEncoder", "ids", ids, self.config.context_length)
        x = self.embed(ids) + self.pos_embed[: ids.shape[1]]
        tokens = self.transformer(x, self.norm)
        pool = self.config.pool
        pooled = tokens.mean(1) if pool == "mean" else tokens[:, 0 if pool == "first" else -1]
        feature = self.head(pooled)
        return (feature, tokens) if return_tokens else feature

    def set_activation_checkpointing(self, enabled: bool, recompute: str = "block") -> None:
        """Recompute each block, or its MLP alone (recompute="mlp"), in the backward pass in place of keeping its activations."""
        self.transformer.set_activation_checkpointing(enabled, recompute)


class CaptionDecoder(nn.Module):
    """Image tokens [B, N, token_dim] -> caption, in the style of OpenVision 1 ("queries") or 2 ("autoregressive").

    One sequence: a prefix that everything sees (projected image tokens, with text_prefix followed by projected text-encoder
    tokens), then a causal part. In "queries" that part is learned queries, one per target; in "autoregressive" it is the caption
    without its last id. The target at place t is the caption's id t + 1 in both.
    """

    def __init__(self, config: CaptionConfig, token_dim: int, text_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.image_proj = Linear(token_dim, width, bias=False)
        self.text_proj = None
        if config.text_prefix:
            if text_dim is None:
                raise ValueError("CaptionDecoder: text_prefix needs text_dim, the width of the text encoder's tokens")
            self.text_proj = Linear(text_dim, width, bias=False)
        if config.style == "queries":
            self.queries = nn.Parameter(torch.randn(config.length, width))
        else:
            self.embed = nn.Embedding(config.vocab_size, width)
            nn.init.normal_(self.embed.weight, std=0.02)
            if config.position == "learned":
                self.pos_embed = nn.Parameter(torch.empty(config.length, width))
                nn.init.normal_(self.pos_embed, std=0.01)
        self.transformer = Transformer(width, config.depth, config.heads, config.mlp_dim, "gelu_tanh")
        self.norm = LayerNorm(width)
        self.head = Linear(width, config.vocab_size, bias=False)
        init_normal(self.transformer, config.residual_init)
        for linear in (self.image_proj, self.text_proj, self.head):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(
        self, tokens: Tensor, caption_ids: Tensor, text_tokens: Tensor | None = None, rng: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, N, token_dim], caption_ids [B, L] ([bos] words [eos] pad) -> (hidden [B, L - 1, D], labels [B, L - 1]).

        The loss is ops.linear_cross_entropy(hidden, self.head.weight, labels); labels past [eos] are -100. With rng and
        visual_keep < 1 each image keeps its own random share of tokens. text_tokens [B, L', text_dim] belongs to text_prefix.
        """
        _check_ids("CaptionDecoder", "caption_ids", caption_ids, self.config.length, least=2)
        if rng is not None and self.config.visual_keep < 1:
            tokens = noise.keep_tokens(tokens, self.config.visual_keep, rng)
        prefix = self._prefix(tokens, text_tokens)
        targets = caption_ids.shape[1] - 1
        if self.config.style == "queries":
            tail = self.queries[:targets].expand(prefix.shape[0], -1, -1)
        else:
            tail = self._embed(caption_ids[:, :-1], start=0)
        x = torch.cat([prefix, tail.to(prefix.dtype)], dim=1)
        x = self.transformer(x, causal=True, prefix_len=prefix.shape[1])
        return self.norm(x[:, prefix.shape[1] :]), self.labels(caption_ids)

    def labels(self, caption_ids: Tensor) -> Tensor:
        """[B, L] -> [B, L - 1]: the next ids up to the first [eos]; a row without [eos] leaves out its padding."""
        labels = caption_ids[:, 1:]
        is_eos = labels == self.config.eos_id
        after = is_eos.cumsum(1) - is_eos.long() > 0
        padding = (labels == self.config.pad_id) & ~is_eos.any(1, keepdim=True)
        return labels.masked_fill(after | padding, IGNORE)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_length: int | None = None,
        beams: int = 1,
        text_tokens: Tensor | None = None,
        length_penalty: float = 0.0,
    ) -> Tensor:
        """tokens [B, N, token_dim] -> ids [B, <= max_length] int64, [bos] first, pad after [eos]. beams = 1 is greedy.

        Beams keep the best summed log-probability, divided by (number of targets) ** length_penalty.
        """
        length = self.config.length if max_length is None else max_length
        if not 2 <= length <= self.config.length:
            raise ValueError(f"CaptionDecoder: max_length must be in 2..{self.config.length}, got {length}")
        prefix = self._prefix(tokens, text_tokens)
        make = self._query_steps if self.config.style == "queries" else self._autoregressive_steps
        config = self.config
        return search(
            make(prefix, beams), prefix.shape[0], beams, length,
            bos=config.bos_id, eos=config.eos_id, pad=config.pad_id, length_penalty=length_penalty, device=tokens.device,
        )  # fmt: skip

    def set_activation_checkpointing(self, enabled: bool, recompute: str = "block") -> None:
        """Recompute each block, or its MLP alone (recompute="mlp"), in the backward pass in place of keeping its activations."""
        self.transformer.set_activation_checkpointing(enabled, recompute)

    def _prefix(self, tokens: Tensor, text_tokens: Tensor | None) -> Tensor:
        if tokens.ndim != 3 or tokens.shape[2] != self.image_proj.in_features:
            raise ValueError(f"CaptionDecoder: tokens must be [B, N, {self.image_proj.in_features}], got {tuple(tokens.shape)}")
        if (text_tokens is None) != (self.text_proj is None):
            wants = "must be given, since text_prefix is on" if text_tokens is None else "has no use, since text_prefix is off"
            raise ValueError(f"CaptionDecoder: text_tokens {wants}")
        prefix = self.image_proj(tokens)
        return prefix if self.text_proj is None else torch.cat([prefix, self.text_proj(text_tokens)], dim=1)

    def _embed(self, ids: Tensor, start: int) -> Tensor:
        x: Tensor = self.embed(ids)
        return x + self.pos_embed[start : start + ids.shape[1]] if self.config.position == "learned" else x

    def _log_probs(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits.float().log_softmax(-1)

    def _query_steps(self, prefix: Tensor, beams: int) -> Step:
        """The queries see no words, so one pass gives the distribution at every position, the same for all beams."""
        tail = self.queries.expand(prefix.shape[0], -1, -1).to(prefix.dtype)
        x = self.transformer(torch.cat([prefix, tail], dim=1), causal=True, prefix_len=prefix.shape[1])
        log_probs = self._log_probs(x[:, prefix.shape[1] :]).repeat_interleave(beams, dim=0)

        def step(place: int, ids: Tensor, rows: Tensor) -> Tensor:
            return log_probs[:, place]

        return step

    def _autoregressive_steps(self, prefix: Tensor, beams: int) -> Step:
        cache = KeyValueCache()
        length = prefix.shape[1]
        prefix = prefix.repeat_interleave(beams, dim=0)

        def step(place: int, ids: Tensor, rows: Tensor) -> Tensor:
            x = self._embed(ids[:, None], start=place)
            if place == 0:
                x = torch.cat([prefix, x.to(prefix.dtype)], dim=1)
                x = self.transformer(x, causal=True, prefix_len=length, cache=cache)
            else:
                if beams > 1:
                    cache.select(rows)
                x = self.transformer(x, causal=True, cache=cache)
            return self._log_probs(x[:, -1])

        return step


def _check_ids(owner: str, name: str, ids: Tensor, most: int, least: int = 1) -> None:
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise ValueError(f"{owner}: {name} must be an int64 tensor [B, L], got {ids.dtype} of shape {tuple(ids.shape)}")
    if not least <= ids.shape[1] <= most:
        raise ValueError(f"{owner}: {name} must have {least}..{most} columns, got {ids.shape[1]}")
