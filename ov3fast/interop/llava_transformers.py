"""A trained run of `ov3fast.understanding` as transformers' LlavaForConditionalGeneration, with its processor and chat template.

    ov3fast export llava runs/understand-base --out understand-hf
    import ov3fast.interop.transformers        # registers the tower
    model = transformers.LlavaForConditionalGeneration.from_pretrained("understand-hf")

All of the tower's tokens are kept (strategy "full"; "default" where CLIP's CLS goes). <image> is a token that the vocabulary gets besides.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ov3fast.inference.load import load_model
from ov3fast.interop import transformers as door
from ov3fast.interop._tower import encoder_of
from ov3fast.io import atomic_folder
from ov3fast.models.config import VAE_STRIDE
from ov3fast.understanding.conversations import PLACE, Template
from ov3fast.understanding.saved import Answerer


def from_answerer(answerer: Answerer) -> tuple[Any, Any]:
    """(LlavaForConditionalGeneration in eval mode, LlavaProcessor): the same weights (copied), the same logits.

    ValueError where the run sees no images, and for a language model that the Llava classes do not take.
    """
    about = answerer.about
    if not about["image_tokens"]:
        raise ValueError("export llava: this run is a control without images")
    tower, images, patch = _tower(about)
    clip = tower.config.model_type.startswith("clip")
    language_model = answerer.model.language_model
    text_config = type(language_model.config).from_dict(language_model.config.to_dict())
    if type(text_config) not in transformers.MODEL_MAPPING:
        raise ValueError(f"export llava: transformers has no model for {type(text_config).__name__} without its own code")
    vocabulary = language_model.get_input_embeddings().num_embeddings
    tokenizer = _with_image_token(answerer.tokenizer, vocabulary)
    place = tokenizer.convert_tokens_to_ids(PLACE)
    text_config.vocab_size = max(vocabulary, place + 1)
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=place,
        image_seq_length=about["image_tokens"],
        vision_feature_select_strategy="default" if clip else "full",
        vision_feature_layer=about["feature_layer"],
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    end = answerer.encoder.end[0]
    state = {f"model.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    for name, value in language_model.base_model.state_dict().items():
        wide = name.startswith("embed_tokens.")
        state[f"model.language_model.{name}"] = _with_row(value, text_config.vocab_size, end) if wide else value
    state["lm_head.weight"] = _with_row(answerer.model.head(), text_config.vocab_size, end)
    for place_in, name in ((0, "linear_1"), (2, "linear_2")):
        for kind in ("weight", "bias"):
            state[f"model.multi_modal_projector.{name}.{kind}"] = getattr(answerer.model.projector[place_in], kind)
    model.load_state_dict({name: value.detach() for name, value in state.items()}, strict=True)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default" if clip else "full",
        num_additional_image_tokens=int(clip),
        chat_template=chat_template(answerer.encoder.template, answerer.tokenizer),
    )
    return model, processor


def export(run: str | Path | Answerer, out: str | Path) -> Path:
    """Writes the folder `out`, all or nothing."""
    answerer = run if isinstance(run, Answerer) else Answerer.load(run)
    if answerer.about["image_aspect"] == "pad":
        warnings.warn(
            "export llava: this run pads images to squares, and the exported processor crops them; pad them before it", stacklevel=2
        )  # fmt: skip
    model, processor = from_answerer(answerer)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
    return Path(out)


def chat_template(template: Template, tokenizer: Any) -> str:
    """`template` in Jinja, over messages of role and content (a text, or a list of image and text parts)."""

    def text(words: str) -> str:
        words = words.replace("{eos}", tokenizer.eos_token or "").replace("{sep}", tokenizer.sep_token or "")
        return "{{ " + repr(words) + " }}" if words else ""

    image = "{{ '" + PLACE + "' }}" + text(template.after_image)
    parts = (
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
        + image
        + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    )
    asked = text(template.before) + (parts if template.asks else image) + text(template.between)
    answered = parts + text(template.after)
    turns = "{% if message.role == 'user' %}" + asked + "{% elif message.role == 'assistant' %}" + answered + "{% endif %}"
    return text(template.system) + "{% for message in messages %}" + turns + "{% endfor %}"


def _tower(about: dict[str, Any]) -> tuple[Any, Any, int]:
    """(the tower as a model of transformers, its image processor, pixels per token side)."""
    from ov3fast.understanding.towers import kind_of

    path, kind = about["tower"], kind_of(about["tower"])
    if kind is None:
        model = load_model(path, vae=about["vae"])
        encoder = encoder_of(model)
        made = door.from_model(model)
        vision: Any = getattr(made, "vision_model", made)
        return vision, door.OpenVision3ImageProcessor(size=encoder.config.image_size), encoder.config.patch_size * VAE_STRIDE
    classes: Any = transformers.CLIPVisionModel if kind.startswith("clip") else transformers.SiglipVisionModel
    vision = classes.from_pretrained(path)
    return vision, transformers.AutoImageProcessor.from_pretrained(path), vision.config.patch_size


def _with_image_token(tokenizer: Any, vocabulary: int) -> Any:
    import copy

    given = copy.deepcopy(tokenizer)
    if len(given) > vocabulary:
        raise ValueError(f"export llava: the tokenizer has {len(given)} tokens, the language model {vocabulary}")
    given.add_special_tokens({"additional_special_tokens": [PLACE]})
    given.image_token = PLACE
    given.padding_side = "left"
    return given


def _with_row(weight: Tensor, rows: int, like: int) -> Tensor:
    """`weight` with rows up to `rows`: that of <image> is never read, and as a copy of the end's it is never the likeliest token alone."""
    missing = rows - weight.shape[0]
    return torch.cat([weight, weight[like : like + 1].expand(missing, -1)]) if missing > 0 else weight
