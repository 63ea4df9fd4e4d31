"""Weights on disk: dtype, device, variants, shards, hub options, memory of loading, other sizes, and export to the released layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ov3fast import OpenVision3, load_vision_encoder
from ov3fast.models import pretrained
from ov3fast.models.config import VisionConfig
from ov3fast.models.vision_tower import WEIGHT_FILES, save_vision_encoder, to_released_state_dict
from ov3fast.models.vit import ViTEncoder

SMALL = VisionConfig(width=48, depth=2, heads=3, mlp_dim=192, image_size=64, embed_dim=40)


@pytest.fixture
def tower() -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(SMALL)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.mark.parametrize("weights", WEIGHT_FILES)
@pytest.mark.parametrize("prefix", ["", "visual."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_released_layout_there_and_back(tower, tmp_path, weights, prefix, dtype):
    """Same keys, same order, same bytes, whatever the file's dtype."""
    tower.set_position_embedding(torch.randn(17, 48))
    state = {key: value.to(dtype) for key, value in to_released_state_dict(tower, prefix).items()}
    (tmp_path / "first").mkdir()
    pretrained.write_tensors(state, tmp_path / "first" / weights)
    save_vision_encoder(tower, tmp_path / "config")
    (tmp_path / "config" / "open_clip_config.json").rename(tmp_path / "first" / "open_clip_config.json")

    loaded = load_vision_encoder(tmp_path / "first", dtype="auto")
    loaded.save_pretrained(tmp_path / "second", weights=weights, prefix=prefix)
    files = [tmp_path / folder / weights for folder in ("first", "second")]
    if weights.endswith(".safetensors"):
        assert files[0].read_bytes() == files[1].read_bytes()
    first, second = (pretrained.read_tensors(file, "test") for file in files)
    assert list(first) == list(second)
    for key, value in first.items():
        assert value.dtype == second[key].dtype == dtype
        assert value.numpy().tobytes() == second[key].numpy().tobytes()
    configs = [json.loads((tmp_path / folder / "open_clip_config.json").read_text()) for folder in ("first", "second")]
    assert configs[0] == configs[1] and load_vision_encoder(tmp_path / "second").config == SMALL


def test_configs_there_and_back():
    from ov3fast.models.config import VISION_SIZES, vision_config
    from ov3fast.models.vision_tower import released_config, vision_config_of

    for size in VISION_SIZES:
        for image_size in (224, 256):
            config = vision_config(size, image_size=image_size, final_ln_after_pool=False)
            assert vision_config_of(released_config(config), {}) == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype(build, tower, tmp_path, dtype):
    build().save_pretrained(tmp_path / "m")
    model = OpenVision3.from_pretrained(tmp_path / "m", dtype=dtype)
    expected = build().to(torch.bfloat16).state_dict()
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    tower.save_pretrained(tmp_path / "t")
    assert load_vision_encoder(tmp_path / "t", dtype=dtype).cls_token.dtype == torch.bfloat16
    latents = torch.randn(1, 16, 4, 4)
    assert load_vision_encoder(tmp_path / "t", dtype=dtype).encode_latents(latents)[1].shape == (1, 4, 48), "still sincos2d"


def test_auto_dtype_is_the_files(build, tmp_path):
    build().half().save_pretrained(tmp_path / "m")
    assert OpenVision3.from_pretrained(tmp_path / "m", dtype="auto").logit_scale.dtype == torch.float16
    assert OpenVision3.from_pretrained(tmp_path / "m").logit_scale.dtype == torch.float32
    for wrong in ("int8", torch.int64, "fp99", 16):
        with pytest.raises(ValueError, match='dtype must be a floating torch.dtype, its name or "auto"'):
            OpenVision3.from_pretrained(tmp_path / "m", dtype=wrong)


def test_parameters_can_be_trained(build, tmp_path):
    build().save_pretrained(tmp_path / "m")
    model = OpenVision3.from_pretrained(tmp_path / "m").train()
    assert all(p.requires_grad and p.is_contiguous() and not p.is_meta for p in model.parameters())
    model(torch.randn(1, 16, 8, 8), decode=False).pooled.sum().backward()
    assert model.encoder.head.weight.grad is not None


def test_the_weights_dont_follow_the_file(build, tmp_path):
    """Overwriting a file in place must not change a model that was loaded from it."""
    build().save_pretrained(tmp_path / "m")
    model = OpenVision3.from_pretrained(tmp_path / "m")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = tmp_path / "m" / "model.safetensors"
    with open(weights, "r+b") as file:
        file.write(b"\0" * weights.stat().st_size)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_variants_and_bin(build, tmp_path):
    folder = tmp_path / "m"
    build().save_pretrained(folder)
    os.rename(folder / "model.safetensors", folder / "model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        OpenVision3.from_pretrained(folder)
    expected = build().state_dict()
    found = OpenVision3.from_pretrained(folder, variant="fp16").state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    (folder / "model.fp16.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    found = OpenVision3.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(build, tmp_path, variant):
    folder = tmp_path / "m"
    build().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    keys, middle = list(state), f"{variant}-" if variant else ""
    names = [
        f"model.{variant}-0000{i}-of-00002.safetensors" if variant else f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    save_file({key: state[key] for key in keys[:9]}, folder / names[0])
    save_file({key: state[key] for key in keys[9:]}, folder / names[1])
    (folder / "model.safetensors").unlink()
    index = "model.safetensors.index.fp16.json" if middle else "model.safetensors.index.json"
    places = {key: names[i >= 9] for i, key in enumerate(keys)}
    (folder / index).write_text(json.dumps({"weight_map": places}))
    found = OpenVision3.from_pretrained(folder, variant=variant).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    (folder / index).write_text(json.dumps({"weight_map": {**places, keys[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map of keys to files in its folder"):
        OpenVision3.from_pretrained(folder, variant=variant)


def test_the_hubs_words_reach_the_hub(build, tower, tmp_path, monkeypatch):
    build(vae="owner/vae").save_pretrained(tmp_path / "m")
    tower.save_pretrained(tmp_path / "t")
    asked = []

    def snapshot_download(name, **words):
        asked.append((name, words))
        return str(tmp_path / name.split("/")[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    words = {"revision": "abc", "token": "secret", "cache_dir": "/c", "local_files_only": True}
    model = OpenVision3.from_pretrained("owner/m", **words)
    load_vision_encoder("hf-hub:owner/t", **words)
    for name, given in asked:
        assert {key: given[key] for key in words} == words, name
        assert "config.json" in given["allow_patterns"] or "open_clip_config.json" in given["allow_patterns"]
    with pytest.raises(FileNotFoundError):
        model.get_vae()
    name, given = asked[-1]
    assert name == "owner/vae" and given["revision"] is None and given["token"] == "secret" and given["local_files_only"]


def test_missing_extra_and_misshapen_keys_in_one_line(build, tmp_path):
    folder = tmp_path / "m"
    build().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    key = "encoder.norm.weight"
    for damaged, message in (
        ({k: v for k, v in state.items() if k != key}, "missing key 'encoder.norm.weight'"),
        ({**state, "stranger": torch.zeros(1)}, "unexpected key 'stranger'"),
        ({**state, key: torch.zeros(3)}, r"encoder\.norm\.weight must have shape \(48,\), got \(3,\)"),
    ):
        save_file(damaged, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message) as error:
            OpenVision3.from_pretrained(folder)
        assert "\n" not in str(error.value)


def test_another_size(tower, build, tmp_path):
    tower.save_pretrained(tmp_path / "t")
    bigger = load_vision_encoder(tmp_path / "t", image_size=96)
    expected = ViTEncoder(VisionConfig(width=48, depth=2, heads=3, mlp_dim=192, image_size=96, embed_dim=40))
    assert bigger.config == expected.config
    assert torch.equal(bigger.position_embedding((6, 6)), expected.position_embedding((6, 6))), "the formula's own"
    with pytest.raises(ValueError, match="image_size must be a multiple of 16 pixels, got 100"):
        load_vision_encoder(tmp_path / "t", image_size=100)
    build().save_pretrained(tmp_path / "m")
    model = OpenVision3.from_pretrained(tmp_path / "m", image_size=128)
    assert model.config.vision.image_size == model.encoder.config.image_size == 128


def test_a_learned_embedding_is_resized(tower, tmp_path):
    grid = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, 48).flatten(0, 1)
    tower.set_position_embedding(torch.cat([torch.full((1, 48), 7.0), grid]))
    tower.save_pretrained(tmp_path / "t")
    bigger = load_vision_encoder(tmp_path / "t", image_size=128)
    assert bigger.pos_embed.shape == (65, 48) and torch.equal(bigger.pos_embed[0], torch.full((48,), 7.0))
    rows = bigger.pos_embed[1:].unflatten(0, (8, 8))
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, 8, -1))
    assert (rows[1:, 0, 0] > rows[:-1, 0, 0]).all() and rows[0, 0, 0] < 0.1 and rows[-1, 0, 0] > 0.9
    assert bigger.encode_latents(torch.randn(1, 16, 16, 16))[1].shape == (1, 64, 48)
    # It survives a round trip with its size.
    bigger.save_pretrained(tmp_path / "u")
    assert torch.equal(load_vision_encoder(tmp_path / "u").pos_embed, bigger.pos_embed)


def test_a_model_with_its_own_positions_is_saved_and_loaded(build, tmp_path):
    model = build()
    model.encoder.set_position_embedding(torch.randn(17, 48))
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(OpenVision3.from_pretrained(tmp_path / "m").encoder.pos_embed, model.encoder.pos_embed)


CHILD = """
import sys, torch
from ov3fast import load_vision_encoder
import ov3fast.ops, safetensors.torch, ov3fast.models.vit
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024
before = peak()
tower = load_vision_encoder(sys.argv[1])
print(before, peak())
assert "sympy" not in sys.modules, "torch.compile's machinery was imported"
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.backend_independent
def test_loading_takes_one_copys_memory(tmp_path):
    config = VisionConfig(width=512, depth=12, heads=8, mlp_dim=2048, image_size=64, embed_dim=512)
    encoder = ViTEncoder(config)
    encoder.save_pretrained(tmp_path / "t")
    size = sum(p.numel() for p in encoder.parameters()) * 4 / 2**20
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "t")], capture_output=True, text=True, check=True)
    before, peak = map(float, done.stdout.split())
    assert size > 100 and peak - before < 1.3 * size, (size, before, peak)
