"""A language model with image input: LLaVA's projector (mlp2x_gelu) in front of a causal language model from transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ov3fast import ops
from ov3fast.models.tokenizer import SPECIALS, get_tokenizer
from ov3fast.recipes.understand import SmallLanguageModel, UnderstandRecipe
from ov3fast.understanding.batches import Batch
from ov3fast.understanding.conversations import IGNORED, IMAGE


class Understander(nn.Module):
    """projector: features [.., D] -> the language model's width. Only the projector and the language model are trained."""

    def __init__(self, language_model: Any, feature_width: int) -> None:
        super().__init__()
        self.language_model = language_model
        width = language_model.get_input_embeddings().embedding_dim
        self.projector = nn.Sequential(nn.Linear(feature_width, width), nn.GELU(), nn.Linear(width, width))

    @property
    def device(self) -> torch.device:
        return self.projector[0].weight.device

    def embed(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """ids [B, L] with IMAGE at image token positions, features [images, N, D] in the same order -> [B, L, E].

        ValueError if the number of features differs from the number of image token positions.
        """
        x = self.language_model.get_input_embeddings()(ids.clamp(min=0))
        here = ids == IMAGE
        given, places = 0 if features is None else features.shape[0] * features.shape[1], int(here.sum())
        if given != places:
            raise ValueError(f"understanding: {places} places for image tokens, and {given} features")
        if features is None:
            return x
        return x.masked_scatter(here[..., None], self.projector(features).to(x.dtype))

    def loss(self, batch: Batch, features: Tensor | None) -> Tensor:
        """Cross-entropy summed over the answer tokens; logits are computed only at those positions."""
        states = self.language_model.base_model(
            inputs_embeds=self.embed(batch.ids, features), attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state  # fmt: skip
        labels = batch.labels[:, 1:]
        counts = labels != IGNORED
        return ops.linear_cross_entropy(states[:, :-1][counts], self.head(), labels[counts], reduction="sum")

    def head(self) -> Tensor:
        """The output weight [V, E]; the input embedding's if the language model has no separate one."""
        head = self.language_model.get_output_embeddings() or self.language_model.get_input_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ValueError("understanding: a language model whose head has a bias is not supported")
        return head.weight

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], features: Tensor | None, end: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy continuation of each prompt up to `end`, exclusive."""
        length = max(map(len, prompts))
        ids = torch.zeros(len(prompts), length, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = torch.tensor(prompt, device=self.device), 1
        made = self.language_model.generate(
            inputs_embeds=self.embed(ids, features), attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        rows = made.tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]


def build_language_model(recipe: UnderstandRecipe, texts: Iterable[str]) -> tuple[Any, Any]:
    """(model, tokenizer) in float32: the one the recipe names, or a small one whose vocabulary covers `texts`."""
    import transformers

    if recipe.language_model:
        options = {"trust_remote_code": recipe.trust_remote_code}
        tokenizer = load_tokenizer(recipe.language_model, recipe.trust_remote_code)
        model = transformers.AutoModelForCausalLM.from_pretrained(recipe.language_model, dtype=torch.float32, **options)
        return model, tokenizer
    tokenizer = small_tokenizer(texts)
    return small_language_model(recipe.small, tokenizer, recipe.seed), tokenizer


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer from a folder or hub id.

    If its config says that tokenizer.json is self-contained, that file is loaded directly: AutoTokenizer would pick the class
    registered for the language model's type, which splits words differently.
    """
    import transformers

    file = Path(path).expanduser() / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return transformers.PreTrainedTokenizerFast.from_pretrained(path)
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def small_tokenizer(texts: Iterable[str]) -> Any:
    """A transformers tokenizer with only the WordPiece tokens that occur in `texts`."""
    import transformers
    from tokenizers import AddedToken

    pad, _, eos, unknown, _, separator, _ = SPECIALS
    backend = get_tokenizer("wordpiece").restrict(texts).backend
    backend.add_special_tokens([AddedToken(name, special=True) for name in (pad, eos, unknown, separator)])
    backend.add_tokens([AddedToken("\n", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, unk_token=unknown, sep_token=separator
    )


def small_language_model(size: SmallLanguageModel, tokenizer: Any, seed: int) -> Any:
    """A randomly initialized Qwen2 of the given size."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.heads,
        num_key_value_heads=size.heads, intermediate_size=size.mlp_dim, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return transformers.Qwen2ForCausalLM(config).eval()
