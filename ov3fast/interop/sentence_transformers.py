"""`encode(list)` for images and texts, as sentence-transformers' CLIP models have it; the library itself is not needed.

model = SentenceEncoder("runs/demo")
images = model.encode([Image.open("a.jpg"), Image.open("b.jpg")])
texts = model.encode(["a red boat", "a dog"], normalize_embeddings=True)
model.similarity(images, texts)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from ov3fast.data.images import ImageError
from ov3fast.inference.encode import encode
from ov3fast.inference.load import VisionTower, load_model
from ov3fast.inference.similarity import encode_texts
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vae import FrozenVAE

Vectors: TypeAlias = "np.ndarray | Tensor | list[Tensor]"


class SentenceEncoder:
    """A model where a SentenceTransformer is expected: strings are texts, everything else that `ov3fast.preprocess` takes are images
    (a picture's file as a pathlib.Path). Vectors are the model's pooled features [E] of images and its features [E] of texts.

    model: an OpenVision3 or a released VisionTower (images alone), or the folder or hub id of one.
    """

    def __init__(
        self,
        model: OpenVision3 | VisionTower | str | Path,
        *,
        vae: FrozenVAE | str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = load_model(model, vae=vae, device=device) if isinstance(model, str | Path) else model
        self.similarity_fn_name = "cosine"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_seq_length(self) -> int | None:
        """Ids of a text that count; None without a text side."""
        return self.model.config.text.context_length if isinstance(self.model, OpenVision3) else None

    def get_sentence_embedding_dimension(self) -> int:
        return self.model.encoder.config.embed_dim

    get_embedding_dimension = get_sentence_embedding_dimension

    @overload
    def encode(self, sentences: Any, *, convert_to_tensor: Literal[True], **options: Any) -> Tensor: ...
    @overload
    def encode(self, sentences: Any, *, output_value: Literal["token_embeddings"], **options: Any) -> list[Tensor]: ...
    @overload
    def encode(self, sentences: Any, **options: Any) -> np.ndarray: ...
    def encode(
        self,
        sentences: Any,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
        **kwargs: Any,
    ) -> Vectors:
        """Texts and images, mixed as they come -> float32 [n, E], in their order; one of them, not in a list -> [E].

        convert_to_tensor: a tensor; convert_to_numpy=False without it: a list of tensors. output_value "token_embeddings" (images alone): a
        list of [N, D]. device must be the model's. Further keywords of the library's (prompts, truncation) are refused unless they are None.
        TypeError or ValueError for what is neither, data.images.ImageError for a picture that can't be read.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value is not None):
            raise TypeError(f"encode: takes no {', '.join(unknown)}")
        if device is not None and torch.device(device).type != self.device.type:
            raise ValueError(f"encode: the model is on {self.device}, not on {device}; give device to SentenceEncoder")
        if output_value not in ("sentence_embedding", "token_embeddings"):
            raise ValueError(f"encode: output_value must be sentence_embedding or token_embeddings, got {output_value!r}")
        single = not isinstance(sentences, list | tuple) and not _is_batch(sentences)
        items = [sentences] if single else list(sentences)
        if output_value == "token_embeddings":
            tokens = self._images(items, batch_size, show_progress_bar, tokens=True)[1]
            assert tokens is not None
            return tokens[0] if single else list(tokens)
        vectors = self._vectors(items, batch_size, bool(show_progress_bar))
        if normalize_embeddings:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        if convert_to_tensor:
            return vectors[0] if single else vectors
        if convert_to_numpy:
            return vectors[0].numpy() if single else vectors.numpy()
        return vectors[0] if single else list(vectors)

    encode_query = encode
    encode_document = encode

    def similarity(self, first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> Tensor:
        """Cosines float32 [n, m]."""
        a, b = (torch.as_tensor(x).float() for x in (first, second))
        a, b = (torch.nn.functional.normalize(x[None] if x.ndim == 1 else x, dim=-1) for x in (a, b))
        return a @ b.T

    def _vectors(self, items: Sequence[Any], batch_size: int, progress: bool) -> Tensor:
        found = torch.empty(len(items), self.get_sentence_embedding_dimension())
        texts = [i for i, item in enumerate(items) if isinstance(item, str)]
        images = [i for i, item in enumerate(items) if not isinstance(item, str)]
        for start in range(0, len(texts), batch_size):
            rows = texts[start : start + batch_size]
            found[rows] = encode_texts(self.model, [items[i] for i in rows])  # type: ignore[arg-type]
        if images:
            found[images] = self._images([items[i] for i in images], batch_size, progress, tokens=False)[0]
        return found

    def _images(
        self, items: Sequence[Any], batch_size: int, progress: bool | None, tokens: bool
    ) -> tuple[Tensor, Tensor | None]:
        if any(isinstance(item, str) for item in items):
            raise ValueError("encode: token_embeddings are those of images; texts have one vector each")
        # Each gets a name of its own: the same file may be there twice.
        named: Any = {str(number): _readable(item) for number, item in enumerate(items)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = encode(self.model, named, batch_size=batch_size, progress=bool(progress), tokens=tokens)
        if found.skipped:
            number, reason = next(iter(found.skipped.items()))
            raise ImageError(reason, f"encode: image {number} can't be read: {reason}")
        return found.pooled, found.tokens


def _is_batch(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor) and value.ndim == 4


def _readable(item: Any) -> Any:
    return item.expanduser() if isinstance(item, Path) else item
