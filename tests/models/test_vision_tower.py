"""The released layout: the key table, parity with plain PyTorch, every file variant, errors."""

import contextlib
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ov3fast import ops
from ov3fast.models.config import VisionConfig, vision_config
from ov3fast.models.vision_tower import (
    from_released_state_dict,
    load_vision_encoder,
    released_state,
    to_released_state_dict,
)
from ov3fast.models.vit import ViTEncoder

SMALL = VisionConfig(width=48, depth=2, heads=3, mlp_dim=192, image_size=64, embed_dim=40)
OPEN_CLIP = {
    "embed_dim": 40,
    "vision_cfg": {
        "image_size": 8, "patch_size": 2, "in_channels": 16, "layers": 2, "width": 48, "head_width": 16, "no_ln_pre": True,
        "pool_type": "avg", "final_ln_after_pool": True, "output_tokens": True, "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip


class PlainTower(nn.Module):
    """The forward contract of the released tower, written from its description in plain PyTorch."""

    def __init__(self, width, layers, heads, hidden, side, channels, embed_dim, after_pool=True):
        super().__init__()
        self.after_pool = after_pool
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, width))
        self.proj = nn.Parameter(torch.randn(width, embed_dim) / width**0.5)
        self.conv1 = nn.Conv2d(channels, width, 2, 2, bias=False)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(PlainBlock(width, heads, hidden) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width, eps=1e-6)

    def forward(self, latents):
        x = self.conv1(latents).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x)
        if self.after_pool:
            tokens = x[:, 1:]
            return self.ln_post(tokens.mean(1)) @ self.proj, tokens
        tokens = self.ln_post(x)[:, 1:]
        return tokens.mean(1) @ self.proj, tokens


class PlainBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


@pytest.fixture
def plain() -> PlainTower:
    torch.manual_seed(0)
    tower = PlainTower(48, 2, 3, 192, 4, 16, 40).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))


def write(folder, state, config=None, name="open_clip_pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {}} if config is None else config
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(state, folder / name) if name.endswith(".bin") else save_file(state, folder / name)
    return folder


@pytest.mark.parametrize(("image_size", "tokens", "values"), [(256, 257, 85_893_120), (224, 197, 85_847_040)])
def test_key_table_of_the_b_tower(image_size, tokens, values):
    with torch.device("meta"):
        encoder = ViTEncoder(vision_config("B", image_size=image_size))
    state = to_released_state_dict(encoder)
    expected = {
        "class_embedding": (768,),
        "positional_embedding": (tokens, 768),
        "proj": (768, 768),
        "conv1.weight": (768, 16, 2, 2),
    }
    for i in range(12):
        expected |= {
            f"transformer.resblocks.{i}.{key}": shape
            for key, shape in {
                "ln_1.weight": (768,),
                "ln_1.bias": (768,),
                "attn.in_proj_weight": (2304, 768),
                "attn.in_proj_bias": (2304,),
                "attn.out_proj.weight": (768, 768),
                "attn.out_proj.bias": (768,),
                "ln_2.weight": (768,),
                "ln_2.bias": (768,),
                "mlp.c_fc.weight": (3072, 768),
                "mlp.c_fc.bias": (3072,),
                "mlp.c_proj.weight": (768, 3072),
                "mlp.c_proj.bias": (768,),
            }.items()
        }
    expected |= {"ln_post.weight": (768,), "ln_post.bias": (768,)}
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(expected.items())
    assert len(state) == 150 and sum(value.numel() for value in state.values()) == values


def test_key_table_of_the_l_tower():
    with torch.device("meta"):
        state = to_released_state_dict(ViTEncoder(vision_config("L", embed_dim=768)), prefix="visual.")
    assert len(state) == 294 and all(key.startswith("visual.") for key in state)
    assert round(sum(value.numel() for value in state.values()) / 1e6, 1) == 303.4


def test_forward_parity_at_the_b_towers_width():
    torch.manual_seed(0)
    plain = PlainTower(768, 1, 12, 3072, 16, 16, 768).eval()
    encoder = from_released_state_dict(plain.state_dict(), vision_config("B", depth=1))
    with torch.no_grad():
        x = torch.randn(1, 16, 32, 32)
        for actual, expected in zip(encoder(x), plain(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_key_order_is_the_plain_towers():
    with torch.device("meta"):
        plain, encoder = PlainTower(768, 12, 12, 3072, 16, 16, 768), ViTEncoder(vision_config("B"))
    assert list(plain.state_dict()) == list(to_released_state_dict(encoder))


@pytest.mark.parametrize("after_pool", [True, False])
def test_parity_in_float64(plain, latents, after_pool, tmp_path):
    plain.after_pool = after_pool
    folder = write(tmp_path / "t", plain.state_dict())
    encoder = load_vision_encoder(folder, final_ln_after_pool=after_pool, dtype=torch.float64)
    for actual, expected in zip(encoder(latents.double()), plain.double()(latents.double()), strict=True):
        torch.testing.assert_close(actual, expected)
    assert encoder.config.final_ln_after_pool is after_pool and not encoder.training


def trained_sizes(width, layers, heads, hidden, side, embed_dim):
    """A tower with values of a trained one's sizes: weights of 0.02, norms around 1."""
    torch.manual_seed(0)
    tower = PlainTower(width, layers, heads, hidden, side, 16, embed_dim).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            near_one = name.endswith("weight") and "ln_" in name
            parameter.copy_(0.02 * torch.randn_like(parameter) + float(near_one))
    return tower


@pytest.mark.parametrize("impl", [None, "reference", "eager", "cpu"])
@pytest.mark.parametrize("after_pool", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [(48, 2, 3, 192, 4, 40), pytest.param((768, 12, 12, 3072, 16, 768), marks=pytest.mark.full, id="B")],
)
def test_float32_is_within_1e5_of_the_formulas(tmp_path, sizes, after_pool, impl):
    """Pooled vector and tokens against the formulas in float64, for both places of the last norm, which the release leaves open."""
    if impl == "cpu" and ops.cpu.unavailable_reason():
        pytest.skip(ops.cpu.unavailable_reason())
    width, layers, heads, _, side, embed_dim = sizes
    plain = trained_sizes(*sizes)
    plain.after_pool = after_pool
    values = {"image_size": 2 * side, "layers": layers, "width": width, "head_width": width // heads}
    config = {"model_cfg": {"embed_dim": embed_dim, "vision_cfg": {**values, "final_ln_after_pool": after_pool}}}
    encoder = load_vision_encoder(write(tmp_path / "t", plain.state_dict(), config))
    assert encoder.config.final_ln_after_pool is after_pool and encoder.cls_token.dtype == torch.float32
    x = torch.randn(2, 16, 2 * side, 2 * side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), ops.use(impl) if impl else contextlib.nullcontext():
        found = encoder(x)
    with torch.no_grad():
        expected = plain.double()(x.double())
    for actual, exact in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32 and float((actual.double() - exact).abs().max()) <= 1e-5


def test_there_and_back(plain):
    encoder = from_released_state_dict(plain.state_dict(), SMALL)
    back = to_released_state_dict(encoder)
    assert all(torch.equal(back[key], value) for key, value in plain.state_dict().items())
    assert list(to_released_state_dict(encoder, prefix="visual."))[0] == "visual.class_embedding"


WRAPPINGS = {
    "as it is": lambda s: s,
    "visual. among others": lambda s: {**{f"visual.{k}": v for k, v in s.items()}, "logit_scale": torch.zeros(())},
    "nested": lambda s: {"epoch": 3, "state_dict": dict(s)},
    "nested module.visual.": lambda s: {"state_dict": {f"module.visual.{k}": v for k, v in s.items()}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "transposed views": lambda s: {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in s.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_loads(plain, latents, tmp_path, wrapping):
    state = WRAPPINGS[wrapping](plain.state_dict())
    encoder = load_vision_encoder(write(tmp_path / "t", state))
    torch.testing.assert_close(encoder(latents), plain(latents))
    assert all(value.is_contiguous() for value in encoder.state_dict().values())


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_every_file_name_loads(plain, latents, tmp_path, name):
    folder = write(tmp_path / "t", plain.state_dict(), name=name)
    for path in (folder, str(folder), folder / name):
        torch.testing.assert_close(load_vision_encoder(path)(latents), plain(latents))


def test_the_position_embedding_is_the_checkpoints(plain, latents, tmp_path):
    encoder = load_vision_encoder(write(tmp_path / "t", plain.state_dict()))
    assert torch.equal(encoder.pos_embed, plain.positional_embedding)
    with pytest.raises(ValueError, match="is not sincos2d, so it serves 4x4 tokens only"):
        encoder(latents[:, :, :4, :4])
    # A release has the formula's values up to rounding, so other sizes work too.
    sincos = ViTEncoder(SMALL).position_embedding((4, 4))
    plain.positional_embedding.data = sincos + 1e-6
    encoder = load_vision_encoder(write(tmp_path / "t", plain.state_dict()))
    assert torch.equal(encoder.pos_embed, sincos + 1e-6)
    assert encoder(latents[:, :, :4, :4])[1].shape == (2, 4, 48)


@pytest.mark.parametrize(
    "config",
    [
        {"model_cfg": OPEN_CLIP},
        OPEN_CLIP,
        {"model_cfg": {**OPEN_CLIP, "text_cfg": {"width": 512}, "custom_text": True}, "preprocess_cfg": {"mean": [0.5] * 3}},
        {"model_cfg": {"vision_cfg": {"image_size": 8, "layers": 2, "width": 48, "head_width": 16}}},
    ],
)
def test_config_is_read_tolerantly(plain, latents, tmp_path, config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = load_vision_encoder(write(tmp_path / "t", plain.state_dict(), config))
    assert encoder.config == SMALL
    torch.testing.assert_close(encoder(latents), plain(latents))


def test_unknown_fields_are_warned_of(plain, latents, tmp_path):
    vision = {**OPEN_CLIP["vision_cfg"], "registers": 4}
    folder = write(tmp_path / "t", plain.state_dict(), {"model_cfg": {**OPEN_CLIP, "vision_cfg": vision}})
    with pytest.warns(UserWarning, match="unknown vision_cfg fields, not used: registers"):
        encoder = load_vision_encoder(folder)
    torch.testing.assert_close(encoder(latents), plain(latents))


def test_options(plain, latents, tmp_path):
    vision = {**OPEN_CLIP["vision_cfg"], "final_ln_after_pool": False}
    folder = write(tmp_path / "t", plain.state_dict(), {"model_cfg": {"vision_cfg": vision}})
    assert load_vision_encoder(folder).config.final_ln_after_pool is False
    encoder = load_vision_encoder(folder, final_ln_after_pool=True, output_tokens=False, latent_convention="flux", embed_dim=40)
    assert torch.equal(encoder(latents), load_vision_encoder(folder, final_ln_after_pool=True)(latents)[0])
    assert encoder.latent_convention == "flux" and load_vision_encoder(folder).latent_convention == "openvision3"


def test_images_go_through_an_attached_vae(plain, make_vae, tmp_path):
    vae = make_vae()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    folder = write(tmp_path / "t", plain.state_dict())
    vae.vae.save_pretrained(tmp_path / "vae")
    mean = vae.moments(images).chunk(2, 1)[0]
    for convention, latents in (("openvision3", mean * 0.3611), ("flux", (mean - 0.1159) * 0.3611)):
        encoder = load_vision_encoder(folder, latent_convention=convention, vae=tmp_path / "vae")
        assert encoder.vae is None and not any("vae" in key for key in encoder.state_dict())
        found = encoder.encode(images.double())
        assert all(torch.equal(a, b) for a, b in zip(found, encoder.encode_latents(latents), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, encoder(latents), strict=True))
        assert encoder.vae.latent_convention == convention and not list(encoder.children()).count(encoder.vae)
    attached = make_vae()
    encoder = load_vision_encoder(folder, vae=attached)
    assert encoder.vae is attached and encoder.double().vae.dtype == torch.float32
    with pytest.raises(ValueError, match="'flux' can't be mixed with 'openvision3'"):
        load_vision_encoder(folder, latent_convention="flux", vae=attached)
    with pytest.raises(ValueError, match="vae: has 4 latent channels, the encoder takes 16"):
        encoder.set_vae(make_vae(latent_channels=4))
    with pytest.raises(ValueError, match=r"sides that are multiples of 16, got \(1, 3, 40, 64\)"):
        encoder.encode(torch.zeros(1, 3, 40, 64))


def test_the_former_name_of_the_convention(plain, tmp_path):
    folder = write(tmp_path / "t", plain.state_dict())
    with pytest.warns(DeprecationWarning, match="now named latent_convention"):
        assert load_vision_encoder(folder, latents="flux").latent_convention == "flux"


def test_so400m_hidden_width():
    values = {"model_cfg": {"vision_cfg": {"width": 1152, "layers": 27, "head_width": 72, "mlp_ratio": 3.7362}}}
    from ov3fast.models.vision_tower import vision_config_of

    config = vision_config_of(values, {})
    assert (config.heads, config.mlp_dim, config.depth) == (16, 4304, 27) and math.isclose(config.width / config.heads, 72)


def vision(**fields):
    return {"model_cfg": {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], **fields}}}


@pytest.mark.parametrize(
    ("damage", "config", "message"),
    [
        (lambda s: s.pop("proj"), None, "missing key 'proj'"),
        (lambda s: s.update({"ln_pre.weight": torch.zeros(48)}), None, "unexpected key 'ln_pre.weight'"),
        (
            lambda s: s.update({"text.w": torch.zeros(1), "conv1.bias": torch.zeros(1)}),
            None,
            "unexpected key 'text.w' and 1 more",
        ),
        (
            None,
            vision(image_size=16),
            r"positional_embedding must have shape \(65, 48\), got \(17, 48\) .*says .* image_size 16\)",
        ),
        (None, vision(layers=3), r"missing key 'transformer.resblocks.2.ln_1.weight' and 11 more .*3 layers"),
        (None, vision(width=96), r"class_embedding must have shape \(96,\), got \(48,\) .*says width 96"),
        (None, vision(pool_type="tok"), "vision_cfg.pool_type = 'tok'; only 'avg' is supported"),
        (None, vision(attentional_pool=True), "vision_cfg.attentional_pool = True"),
        (None, vision(layers="two"), "vision_cfg.layers = 'two'; it takes a positive number"),
        (None, {"model_cfg": {}}, "has no vision_cfg"),
        (None, [1], "must hold a JSON object, got list"),
    ],
)
def test_errors_name_the_key(plain, tmp_path, damage, config, message):
    state = dict(plain.state_dict())
    if damage:
        damage(state)
    folder = write(tmp_path / "t", state, config)
    with pytest.raises(ValueError, match=message) as error:
        load_vision_encoder(folder)
    assert "\n" not in str(error.value)


def test_errors_of_files(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or file /nowhere"):
        load_vision_encoder("/nowhere")
    with pytest.raises(FileNotFoundError, match=r"has none of open_clip_model\.safetensors"):
        load_vision_encoder(tmp_path)
    folder = write(tmp_path / "t", plain.state_dict())
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config\.json"):
        load_vision_encoder(folder)
    with pytest.raises(ValueError, match="latent_convention: must be one of openvision3, flux; got 'sd'"):
        load_vision_encoder(folder, latent_convention="sd")
    with pytest.raises(ValueError, match="'epoch' is no tensor but int"):
        released_state({"epoch": 3})


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    folder = write(tmp_path / "t", {"proj": Evil()})
    with pytest.raises(ValueError, match="can't read") as error:
        load_vision_encoder(folder)
    assert "\n" not in str(error.value) and "ran" not in capsys.readouterr().out
