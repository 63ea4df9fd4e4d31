"""transformers: the same weights give the same tokens through its classes, with and without ov3fast, and in Llava."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ov3fast
from ov3fast.inference import VisionTower

transformers = pytest.importorskip("transformers")

import ov3fast.interop.transformers as door  # noqa: E402

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""For weights memory-mapped by transformers: oneDNN picks other kernels for their alignment."""


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return door.export(model, tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def tower_folder(model, tmp_path_factory):
    return door.export(VisionTower(model.encoder, model.get_vae()), tmp_path_factory.mktemp("hf") / "tower")


def test_in_memory_bit_for_bit(model, images):
    made = door.from_model(model)
    with torch.no_grad():
        pooled, tokens = model.encode(images)
        found = made.get_image_features(images)
        assert torch.equal(found.pooler_output, pooled) and torch.equal(found.last_hidden_state, tokens)
        latents = made.vision_model(latents=model.encode_to_latents(images))
        torch.testing.assert_close(latents.pooler_output, pooled, **CLOSE)
        ids = model.text_ids(["a red square", "red"])
        assert torch.equal(made.get_text_features(ids).pooler_output, model.encode_text(ids))
        out = made(ids, images)
        image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (pooled, model.encode_text(ids)))
        torch.testing.assert_close(out.logits_per_image, model.logit_scale.exp() * image @ text.t())
        assert torch.equal(out.logits_per_text, out.logits_per_image.t())


@pytest.mark.parametrize("fields", [{"tokens": "post_ln"}, {"latent_convention": "flux"}, {"contrastive": "sigmoid"}])
def test_what_the_paper_leaves_open(model, images, fields):
    import dataclasses

    from ov3fast import OpenVision3
    from ov3fast.models.vae import FrozenVAE

    other = OpenVision3(dataclasses.replace(model.config, **fields), FrozenVAE(model.get_vae().vae), model.tokenizer).eval()
    made = door.from_model(other)
    with torch.no_grad():
        found, (pooled, tokens) = made.get_image_features(images), other.encode(images)
    assert torch.equal(found.pooler_output, pooled) and torch.equal(found.last_hidden_state, tokens)
    assert (made.logit_bias is not None) == (fields.get("contrastive") == "sigmoid")


@pytest.mark.parametrize("after_pool", [True, False])
def test_both_norms_of_the_released_tower_and_its_own_positions(images, vae, after_pool):
    from ov3fast.models.config import VisionConfig
    from ov3fast.models.vit import ViTEncoder

    torch.manual_seed(0)
    config = VisionConfig(width=32, depth=2, heads=2, mlp_dim=48, image_size=32, embed_dim=24, final_ln_after_pool=after_pool)
    encoder = ViTEncoder(config).eval()
    encoder.set_position_embedding(torch.randn(5, 32))
    encoder.set_vae(vae)
    with torch.no_grad():
        found, (pooled, tokens) = door.from_model(encoder)(images), encoder.encode(images)
    assert torch.equal(found.pooler_output, pooled) and torch.equal(found.last_hidden_state, tokens)


def test_hidden_states(model, images):
    made = door.from_model(model).vision_model
    with torch.no_grad():
        out = made(images, output_hidden_states=True)
    assert made(images).hidden_states is None
    assert len(out.hidden_states) == 3 and all(state.shape == (2, 4, 32) for state in out.hidden_states)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    seen = []
    hook = model.encoder.transformer.blocks[1].register_forward_hook(lambda _, inputs, __: seen.append(sum(inputs[:2])[:, 1:]))
    with torch.no_grad():
        model.encode(images)
    hook.remove()
    assert torch.equal(out.hidden_states[1], seen[0])
    pair = made(images, return_dict=False)
    assert torch.equal(pair[0], out.last_hidden_state) and torch.equal(pair[1], out.pooler_output)


def test_other_sizes(model):
    made, images = door.from_model(model).vision_model, torch.rand(1, 3, 48, 64) * 2 - 1
    with pytest.raises(ValueError, match="images must be 32 x 32 pixels, got 48 x 64; interpolate_pos_encoding=True"):
        made(images)
    with torch.no_grad():
        assert torch.equal(made(images, interpolate_pos_encoding=True).last_hidden_state, model.encode(images)[1])
    with pytest.raises(ValueError, match="sides that are multiples of 16"):
        made(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match="pixel_values or latents, one of them"):
        made()


def test_auto_classes(model, images, folder, tower_folder):
    with torch.no_grad():
        pooled, tokens = model.encode(images)
        for path, kind in ((folder, door.OpenVision3Model), (tower_folder, door.OpenVision3VisionModel)):
            loaded = transformers.AutoModel.from_pretrained(path)
            assert type(loaded) is kind and type(transformers.AutoConfig.from_pretrained(path)) is kind.config_class
            found = (loaded if path == tower_folder else loaded.vision_model)(images)
            torch.testing.assert_close(found.pooler_output, pooled, **CLOSE)
            torch.testing.assert_close(found.last_hidden_state, tokens, **CLOSE)
            assert type(transformers.AutoImageProcessor.from_pretrained(path)) is door.OpenVision3ImageProcessor
    assert type(transformers.AutoProcessor.from_pretrained(folder)) is door.OpenVision3Processor


def test_half_precision_keeps_the_vae_wide(folder, images, model):
    loaded = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.vision_model.head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.vision_model.vae.parameters()} == {torch.float32}
    found = loaded.get_image_features(images.bfloat16()).pooler_output
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float(), model.encode_image(images)).min() > 0.999


def picture(mode: str, photo: Image.Image) -> Image.Image:
    if mode == "RGBA":
        photo = photo.copy()
        photo.putalpha(Image.linear_gradient("L").resize(photo.size))
        return photo
    if mode == "I;16":
        return Image.fromarray(np.arange(70 * 50, dtype=np.uint16).reshape(50, 70) * 18)
    return photo.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_the_image_processor_is_preprocess(photo, mode):
    image = picture(mode, photo)
    found = door.OpenVision3ImageProcessor(size=32)(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(found, ov3fast.preprocess(image, 32), rtol=0, atol=1e-6)


def test_the_image_processors_inputs(photo):
    processor, expected = door.OpenVision3ImageProcessor(size=32), ov3fast.preprocess(photo, 32)[0]
    array = np.array(photo)
    batch = [photo, array, array.transpose(2, 0, 1), torch.from_numpy(array)]
    found = processor(batch, return_tensors="pt").pixel_values
    assert found.shape == (4, 3, 32, 32) and all(torch.allclose(one, expected, atol=1e-6) for one in found)
    assert processor(photo, size={"shortest_edge": 48}, return_tensors="np").pixel_values.shape == (1, 3, 48, 48)
    with pytest.raises(TypeError, match="must be uint8, got float32"):
        processor(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="size must be one side"):
        door.OpenVision3ImageProcessor(size={"height": 32, "width": 64})


def test_the_processor(model, photo, folder):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    texts = ["a red square", "red red red red red red red red red red red", ""]
    inputs = processor(text=texts, images=[photo])
    assert torch.equal(inputs["input_ids"], model.text_ids(texts))
    torch.testing.assert_close(inputs["pixel_values"], ov3fast.preprocess(photo, 32), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="give text, images or both"):
        processor()


WITHOUT_OV3FAST = """
import sys, torch
sys.modules["ov3fast"] = None
from transformers import AutoImageProcessor, AutoModel
from PIL import Image
folder, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
images = torch.load(out)["images"]
with torch.no_grad():
    found = getattr(model, "vision_model", model)(images, output_hidden_states=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
pixels = processor(Image.new("RGB", (40, 50), (255, 0, 0)), return_tensors="pt").pixel_values
torch.save({"tokens": found.last_hidden_state, "pooled": found.pooler_output, "pixels": pixels}, out)
"""


@pytest.mark.parametrize("kind", ["model", "tower"])
def test_trust_remote_code_without_ov3fast(model, images, folder, tower_folder, tmp_path, kind):
    """The folder's own code, on plain PyTorch, in a process where importing ov3fast fails."""
    torch.save({"images": images}, tmp_path / "io.pt")
    path = folder if kind == "model" else tower_folder
    command = [sys.executable, "-c", WITHOUT_OV3FAST, str(path), str(tmp_path / "io.pt")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "io.pt")
    with torch.no_grad():
        pooled, tokens = model.encode(images)
    torch.testing.assert_close(found["tokens"], tokens, **CLOSE)
    torch.testing.assert_close(found["pooled"], pooled, **CLOSE)
    assert torch.equal(found["pixels"], torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_import_of_ov3fast_imports_no_transformers():
    code = "import sys, ov3fast, ov3fast.interop, ov3fast.inference; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def llava():
    """A tower of 256 tokens in front of a tiny language model, strategy "full"."""
    from ov3fast.models.config import VisionConfig
    from ov3fast.models.vae import FLUX_VAE, FrozenVAE
    from ov3fast.models.vit import ViTEncoder

    torch.manual_seed(0)
    encoder = ViTEncoder(VisionConfig(width=32, depth=3, heads=2, mlp_dim=48, image_size=256, embed_dim=24)).eval()
    small = {"block_out_channels": [4, 4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2, "mid_block_add_attention": False}
    encoder.set_vae(FrozenVAE.from_config({**FLUX_VAE, **small}))
    tower = door.from_model(encoder)
    text = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=60,
        image_seq_length=256,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model, encoder


def llava_inputs(count: int = 256):
    ids = torch.cat([torch.tensor([1, 5, 6]), torch.full((count,), 60), torch.tensor([7, 8])])[None]
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


def test_llava_sees_all_256_tokens(llava):
    model, encoder = llava
    inputs = llava_inputs()
    with torch.no_grad():
        out = model(**inputs)
    assert out.logits.shape == (1, 261, 64) and out.image_hidden_states.shape[-2:] == (256, 32)
    states = encoder_states(encoder, inputs["pixel_values"])
    with torch.no_grad():
        expected = model.model.multi_modal_projector(states[-2])
    torch.testing.assert_close(out.image_hidden_states.reshape(expected.shape), expected, **CLOSE)
    with pytest.raises(ValueError, match="do not match"), torch.no_grad():
        model(**llava_inputs(255))


def encoder_states(encoder, images):
    states = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: states.append((out[0] + out[1])[:, 1:]))
        for block in encoder.transformer.blocks
    ]
    with torch.no_grad():
        encoder.encode(images)
    for hook in hooks:
        hook.remove()
    return states


def test_llava_generates_saves_and_loads(llava, tmp_path):
    model, _ = llava
    inputs = llava_inputs()
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        logits = model(**inputs).logits
    assert ids.shape == (1, 265)
    model.save_pretrained(tmp_path / "llava")
    assert (
        json.loads((tmp_path / "llava" / "config.json").read_text())["vision_config"]["model_type"]
        == "openvision3_vision_model"
    )
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    assert type(again.model.vision_tower) is door.OpenVision3VisionModel
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, logits, **CLOSE)
        assert torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None), ids)


def test_llava_trains_the_tower(llava):
    model, _ = llava
    inputs = llava_inputs()
    model.train()
    model.gradient_checkpointing_enable()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    tower = model.model.vision_tower
    assert tower.patch_embed.weight.grad is not None and all(p.grad is None for p in tower.vae.parameters())
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model.eval()


def test_llavas_processor_asks_for_256_tokens(model, photo):
    processor = transformers.LlavaProcessor(
        door.OpenVision3ImageProcessor(size=256),
        llava_tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    inputs = processor(images=photo, text="<image> a", return_tensors="pt")
    assert int((inputs["input_ids"] == 0).sum()) == 256 and inputs["pixel_values"].shape == (1, 3, 256, 256)


def llava_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<image>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer
