"""The door to transformers. Importing this file registers the classes with AutoConfig, AutoModel, AutoImageProcessor and AutoProcessor.

    import ov3fast.interop.transformers as door
    door.export("runs/demo", "demo-hf")                      # or: ov3fast export transformers runs/demo --out demo-hf
    model = transformers.AutoModel.from_pretrained("demo-hf")

A folder that `export` wrote also loads where ov3fast is not installed, with trust_remote_code=True: it holds its code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ov3fast.inference.load import VisionTower, load_model
from ov3fast.interop import remote_code
from ov3fast.interop._tower import vae_config
from ov3fast.interop.remote_code.configuration_openvision3 import (
    OpenVision3Config,
    OpenVision3TextConfig,
    OpenVision3VisionConfig,
)
from ov3fast.interop.remote_code.image_processing_openvision3 import OpenVision3ImageProcessor
from ov3fast.interop.remote_code.modeling_openvision3 import OpenVision3Model, OpenVision3TextModel, OpenVision3VisionModel
from ov3fast.interop.remote_code.processing_openvision3 import OpenVision3Processor
from ov3fast.io import atomic_folder
from ov3fast.models.config import VAE_STRIDE
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import CLIP_SPECIALS, SPECIALS, Tokenizer
from ov3fast.models.vae import FrozenVAE
from ov3fast.models.vit import ViTEncoder

__all__ = [
    "OpenVision3Config",
    "OpenVision3ImageProcessor",
    "OpenVision3Model",
    "OpenVision3Processor",
    "OpenVision3TextConfig",
    "OpenVision3TextModel",
    "OpenVision3VisionConfig",
    "OpenVision3VisionModel",
    "export",
    "from_model",
    "processor_for",
    "register",
]

_CODE = {
    "AutoConfig": "configuration_openvision3.{}Config",
    "AutoModel": "modeling_openvision3.{}Model",
    "AutoImageProcessor": "image_processing_openvision3.OpenVision3ImageProcessor",
    "AutoProcessor": "processing_openvision3.OpenVision3Processor",
}


def register() -> None:
    """Makes the classes known to transformers' Auto classes; importing this file does it."""
    for config, model in (
        (OpenVision3Config, OpenVision3Model),
        (OpenVision3VisionConfig, OpenVision3VisionModel),
        (OpenVision3TextConfig, OpenVision3TextModel),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    for config in (OpenVision3Config, OpenVision3VisionConfig):
        AutoImageProcessor.register(config, slow_image_processor_class=OpenVision3ImageProcessor, exist_ok=True)
    AutoProcessor.register(OpenVision3Config, OpenVision3Processor, exist_ok=True)


def from_model(model: OpenVision3 | VisionTower | ViTEncoder) -> PreTrainedModel:
    """The same weights (copied) as OpenVision3Model, or as OpenVision3VisionModel where there is no text tower; in eval mode.

    The VAE's encoder is part of it. What transformers has no word for, the reconstruction decoder and the captioner, stays out.
    """
    encoder = model if isinstance(model, ViTEncoder) else model.encoder
    post_ln = isinstance(model, OpenVision3) and model.config.tokens == "post_ln"
    vision = _vision_config(encoder, post_ln)
    states = [("", encoder.state_dict()), ("vae.", _vae_state(encoder.get_vae()))]
    made: PreTrainedModel
    if not isinstance(model, OpenVision3):
        made = OpenVision3VisionModel(vision)
        state = _joined(states)
    else:
        text = model.config.text
        config = OpenVision3Config(
            vision_config=vision,
            text_config=OpenVision3TextConfig(
                hidden_size=text.width,
                num_hidden_layers=text.depth,
                num_attention_heads=text.heads,
                intermediate_size=text.mlp_dim,
                vocab_size=text.vocab_size,
                max_position_embeddings=text.context_length,
                projection_dim=model.config.vision.embed_dim,
                pool=text.pool,
            ),
            projection_dim=model.config.vision.embed_dim,
            logit_scale_init_value=float(model.logit_scale.detach()),
            sigmoid=model.logit_bias is not None,
        )
        made = OpenVision3Model(config)
        state = _joined([(f"vision_model.{prefix}", part) for prefix, part in states])
        state |= _joined([("text_model.", model.text.state_dict())])
        state["logit_scale"] = model.logit_scale.detach()
        if model.logit_bias is not None:
            state["logit_bias"] = model.logit_bias.detach()
    if not vision.learned_positions:
        state = {key: value for key, value in state.items() if not (key.endswith("pos_embed") and "text_model" not in key)}
    made.to(encoder.cls_token.dtype)
    vae: Any = getattr(made, "vision_model", made).vae
    if vae.dtype != encoder.get_vae().dtype:
        vae.to(encoder.get_vae().dtype)
    made.load_state_dict(state, strict=True)
    return made.to(encoder.device).eval()


def processor_for(model: OpenVision3 | VisionTower | ViTEncoder) -> OpenVision3Processor | OpenVision3ImageProcessor:
    """The processor of `from_model(model)`; the image processor alone where there is no text tower."""
    encoder = model if isinstance(model, ViTEncoder) else model.encoder
    images = OpenVision3ImageProcessor(size=encoder.config.image_size)
    if not isinstance(model, OpenVision3):
        return images
    return OpenVision3Processor(images, _tokenizer(model.tokenizer, model.config.text.context_length))


def export(
    model: OpenVision3 | VisionTower | ViTEncoder | str | Path, out: str | Path, *, vae: FrozenVAE | str | Path | None = None
) -> Path:
    """Writes the folder `out`, all or nothing: config.json, model.safetensors, the processor and the code for trust_remote_code.

    model: one in memory, or what `inference.load_model` takes, with `vae`.
    """
    if isinstance(model, str | Path):
        model = load_model(model, vae=vae)
    made, processor = from_model(model), processor_for(model)
    kind = type(made).__name__.removesuffix("Model")
    code = {key: value.format(kind) for key, value in _CODE.items()}
    if not isinstance(model, OpenVision3):
        del code["AutoProcessor"]
    with atomic_folder(out) as folder:
        made.save_pretrained(folder)
        processor.save_pretrained(folder)
        if isinstance(processor, OpenVision3Processor):
            # Where AutoImageProcessor looks for it; the processor's own file repeats it.
            processor.image_processor.save_pretrained(folder)
        for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file():
                _set_auto_map(folder / name, code)
        for name in sorted({value.split(".")[0] for value in code.values()}):
            shutil.copy(Path(remote_code.__file__).parent / f"{name}.py", folder)
    return Path(out)


def _set_auto_map(path: Path, code: dict[str, str]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    own = {"config.json": ("AutoConfig", "AutoModel"), "preprocessor_config.json": ("AutoImageProcessor",)}
    keys = own.get(path.name, ("AutoProcessor", "AutoImageProcessor"))
    values["auto_map"] = {key: code[key] for key in keys if key in code}
    if isinstance(values.get("image_processor"), dict):
        values["image_processor"]["auto_map"] = {"AutoImageProcessor": code["AutoImageProcessor"]}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _vision_config(encoder: ViTEncoder, post_ln: bool) -> OpenVision3VisionConfig:
    own, vae = encoder.config, encoder.get_vae()
    scale, shift = vae.scale_and_shift(encoder.latent_convention)
    return OpenVision3VisionConfig(
        hidden_size=own.width,
        num_hidden_layers=own.depth,
        num_attention_heads=own.heads,
        intermediate_size=own.mlp_dim,
        image_size=own.image_size,
        patch_size=own.patch_size * VAE_STRIDE,
        latent_patch_size=own.patch_size,
        latent_channels=own.in_channels,
        projection_dim=own.embed_dim,
        final_ln_after_pool=own.final_ln_after_pool,
        post_ln=post_ln,
        learned_positions=encoder.pos_embed is not None,
        latent_convention=encoder.latent_convention,
        latent_scale=scale,
        latent_shift=shift,
        vae_config=vae_config(vae),
    )


def _vae_state(vae: FrozenVAE) -> dict[str, torch.Tensor]:
    return {key: value for key, value in vae.vae.state_dict().items() if not key.startswith(("decoder.", "post_quant_conv."))}


def _joined(parts: list[tuple[str, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for prefix, state in parts for key, value in state.items()}


def _tokenizer(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    if tokenizer.name == "wordpiece":
        pad, bos, eos, unknown, cls, separator, mask = SPECIALS
        words = {"pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": unknown, "cls_token": cls}
        words |= {"sep_token": separator, "mask_token": mask}
    else:
        # CLIP pads with id 0.
        first = tokenizer.backend.id_to_token(tokenizer.pad_id)
        words = {
            "pad_token": first,
            "bos_token": CLIP_SPECIALS[0],
            "eos_token": CLIP_SPECIALS[1],
            "cls_token": CLIP_SPECIALS[1],
        }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, model_max_length=length, **words)


register()
