"""The conformance matrix, doors x weights x dtypes: a model's pooled vectors, tokens and text features come through every door with the same bits."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ov3fast.inference import VisionTower, load_model
from ov3fast.inference.batches import batch_invariant
from ov3fast.interop import llava, open_clip, rae, timm
from ov3fast.interop.sentence_transformers import SentenceEncoder
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.vision_tower import save_vision_encoder

from .conftest import own_positions, released

diffusers = pytest.importorskip("ov3fast.interop.diffusers")
transformers = pytest.importorskip("ov3fast.interop.transformers")

TEXTS = ["a red square", "red"]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# Each door: (model, images) -> (pooled, tokens), None for what it doesn't have.


def through_transformers(model, images):
    made = transformers.from_model(model)
    found = made.get_image_features(images) if isinstance(model, OpenVision3) else made(images)
    return found.pooler_output, found.last_hidden_state


def through_open_clip(model, images):
    return open_clip.create_model_and_transforms(model)[0].encode_image(images), None


def through_timm(model, images):
    made = timm.TimmModel(model)
    return made(images), made.forward_features(images)


def through_diffusers(model, images):
    made = diffusers.AutoencoderOpenVision3.from_model(model)
    latent = made.encode(images).latent
    # Its latents are normalised, by ones and zeros here.
    _, deviation = made._statistics(latent)
    tokens = model.encode(images)[1].transpose(1, 2).unflatten(2, latent.shape[2:])
    assert torch.equal(latent, tokens / deviation)
    return None, None


def through_llava(model, images):
    args = SimpleNamespace(mm_vision_select_layer=-1)
    return None, llava.OpenVision3VisionTower(model, args)(images)


def through_rae(model, images):
    return None, rae.Stage1Encoder(model)(images)


def through_sentence_transformers(model, images):
    made = SentenceEncoder(model)
    tokens = made.encode(images, output_value="token_embeddings", convert_to_tensor=True)
    return made.encode(images, convert_to_tensor=True), torch.stack(list(tokens))


DOORS = {
    "transformers": through_transformers,
    "open_clip": through_open_clip,
    "timm": through_timm,
    "diffusers": through_diffusers,
    "llava": through_llava,
    "rae": through_rae,
    "sentence_transformers": through_sentence_transformers,
}
NEEDS_A_DECODER = {"diffusers"}


# Each kind of weights: (model, its folder, an empty folder, dtype) -> that model as it is loaded.


def in_memory(make):
    return lambda model, folder, empty, dtype: make(model).to(dtype)


def whole_copy(model):
    made = OpenVision3(model.config, vae=model.get_vae(), tokenizer=model.tokenizer)
    made.load_state_dict(model.state_dict())
    return made.eval()


def whole_from_bin(model, folder, empty, dtype):
    shutil.copytree(folder, empty / "whole")
    weights = empty / "whole" / "model.safetensors"
    torch.save(load_file(weights), empty / "whole" / "pytorch_model.bin")
    weights.unlink()
    return load_model(empty / "whole", dtype=dtype)


def tower_from(make, file, prefix):
    def load(model, folder, empty, dtype):
        encoder = make(model)
        save_vision_encoder(getattr(encoder, "encoder", encoder), empty / "tower", weights=file, prefix=prefix)
        return load_model(empty / "tower", vae=model.get_vae(), dtype=dtype)

    return load


WEIGHTS = {
    "whole": in_memory(whole_copy),
    "whole, safetensors": lambda model, folder, empty, dtype: load_model(folder, dtype=dtype),
    "whole, bin": whole_from_bin,
    "tower": in_memory(released),
    "tower, safetensors": tower_from(released, "open_clip_model.safetensors", "visual."),
    "tower, bin": tower_from(released, "open_clip_pytorch_model.bin", ""),
    "tower, norm before the pool": in_memory(lambda model: VisionTower(own_positions(model), model.get_vae())),
    "tower, norm before the pool, safetensors": tower_from(own_positions, "model.safetensors", "visual."),
}


@pytest.fixture(scope="module")
def loaded(model, model_folder, tmp_path_factory):
    """(weights, dtype) -> that model, loaded once."""
    made = {}

    def load(weights, dtype):
        if (weights, dtype) not in made:
            made[weights, dtype] = WEIGHTS[weights](model, model_folder, tmp_path_factory.mktemp("weights"), dtype)
            assert made[weights, dtype].encode(torch.zeros(1, 3, 32, 32))[1].dtype == dtype
        return made[weights, dtype]

    return load


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("door", DOORS)
def test_tokens(loaded, images, door, weights, dtype):
    given = loaded(weights, dtype)
    if door in NEEDS_A_DECODER and not isinstance(given, OpenVision3):
        with pytest.raises(ValueError, match="a released vision tower has no decoder"):
            DOORS[door](given, images)
        return
    # Doors may encode in a way whose bits don't depend on the batch; here all do.
    with torch.no_grad(), batch_invariant(given):
        pooled, tokens = given.encode(images)
        got_pooled, got_tokens = DOORS[door](given, images)
    if got_pooled is not None:
        assert torch.equal(got_pooled, pooled.to(got_pooled.dtype))
    if got_tokens is not None:
        assert torch.equal(got_tokens, tokens.to(got_tokens.dtype))


@pytest.mark.parametrize("door", DOORS)
def test_float16_is_refused_on_a_cpu(loaded, images, door):
    with pytest.raises(TypeError, match="float16 on the CPU, where it is about 1000 times slower; use bfloat16"):
        DOORS[door](whole_copy(loaded("whole", torch.float32)).half(), images)


TEXT_DOORS = {
    "transformers": lambda m: transformers.from_model(m).get_text_features(m.text_ids(TEXTS)).pooler_output,
    "open_clip": lambda m: open_clip.create_model_and_transforms(m)[0].encode_text(open_clip.get_tokenizer(m)(TEXTS)),
    "sentence_transformers": lambda m: SentenceEncoder(m).encode(TEXTS, convert_to_tensor=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name.startswith("whole")])
@pytest.mark.parametrize("door", TEXT_DOORS)
def test_texts(loaded, door, weights, dtype):
    given = loaded(weights, dtype)
    with torch.no_grad(), batch_invariant(given):
        got = TEXT_DOORS[door](given)
        assert torch.equal(got, given.encode_text(TEXTS).to(got.dtype))


def test_the_matrix_has_every_door():
    """A new file in ov3fast/interop is a door, unless it writes files or begins with an underscore."""
    from pathlib import Path

    import ov3fast.interop

    found = {path.stem for path in Path(ov3fast.interop.__file__).parent.glob("[!_]*.py")}
    assert found - {"onnx", "openvino", "torch", "llava_transformers"} == set(DOORS)
