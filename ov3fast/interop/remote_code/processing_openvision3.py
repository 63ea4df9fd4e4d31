"""Images and texts -> what OpenVision3Model takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin


class OpenVision3Processor(ProcessorMixin):
    """image_processor and tokenizer in one. Texts are laid out as the text encoder was trained: [bos] words [eos] pad ... [CLS]."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self, text: Any = None, images: Any = None, max_length: int | None = None, return_tensors: Any = "pt", **kwargs: Any
    ) -> BatchFeature:
        """input_ids [B, max_length] (default: the model's context length) and pixel_values [B, 3, H, W], of what is given."""
        if text is None and images is None:
            raise ValueError("OpenVision3Processor: give text, images or both")
        data: dict[str, Any] = {}
        if text is not None:
            data["input_ids"] = self._ids([text] if isinstance(text, str) else list(text), max_length)
        if images is not None:
            data["pixel_values"] = self.image_processor(images, **kwargs)["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _ids(self, texts: list[str], max_length: int | None) -> np.ndarray:
        tokenizer = self.tokenizer
        length = tokenizer.model_max_length if max_length is None else max_length
        ids = np.full((len(texts), length), tokenizer.pad_token_id, np.int64)
        for row, words in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
            line = [tokenizer.bos_token_id, *words[: length - 3], tokenizer.eos_token_id]
            ids[row, : len(line)] = line
        ids[:, -1] = tokenizer.cls_token_id
        return ids


__all__ = ["OpenVision3Processor"]
