"""ov3fast.optimize: other libraries' models give the same outputs within the budget, and the original is unchanged."""

import copy
import json

import pytest
import torch

import ov3fast
from ov3fast.inference import VisionTower, choosing
from ov3fast.testing import assert_within_budget

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip(**fields):
    config = transformers.CLIPVisionConfig(**{**SIZES, "image_size": 32, "patch_size": 8, "hidden_act": "gelu", **fields})
    return transformers.CLIPVisionModel(config)


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=32, patch_size=8))


def dinov2():
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=32, patch_size=8))


def vae():
    from diffusers import AutoencoderKL

    from ov3fast.models.vae import FLUX_VAE

    small = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    return AutoencoderKL.from_config({**FLUX_VAE, **small})


TOWERS = {"clip": clip, "siglip": siglip, "dinov2": dinov2, "clip_quick_gelu": lambda: clip(hidden_act="quick_gelu")}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No lengthy timing, no compiler, and a private cache."""
    monkeypatch.setattr(choosing, "SECONDS", 0.0)
    monkeypatch.setattr(choosing, "ROUNDS", 1)
    monkeypatch.setattr(choosing, "compiled", lambda *_: (_ for _ in ()).throw(RuntimeError("left out")))
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path / "cache"))


def made(build):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():  # norms that are not the identity
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(dtype=torch.float32, side=32):
    return (torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_within_the_budget(name, dtype):
    model = made(TOWERS[name])
    fast = ov3fast.optimize(model, dtype=dtype, mode="ours")
    assert type(fast) is type(model) and list(fast.state_dict()) == list(model.state_dict())
    assert set(fast.report.choices.values()) == {"ours"} and len(fast.report.choices) >= 3
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(pixel_values=images(torch.float64))
        eager = copy.deepcopy(model).to(dtype)(pixel_values=images(dtype))
        got = fast(pixel_values=images(dtype))
    for key in ("last_hidden_state", "pooler_output"):
        assert_within_budget(got[key], eager[key], exact[key], key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_autoencoder_is_within_the_budget(dtype):
    model, x = made(vae), images(dtype, 64)
    fast = ov3fast.optimize(model, dtype=dtype, mode="ours")
    assert any("GroupNormSiLU" in type(part).__name__ for part in fast.modules())
    assert not any("GroupNormSiLU" in type(part).__name__ for part in model.modules()), "the original is as it was"
    with torch.no_grad():
        wide, same = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
        moments = [m.encode(v).latent_dist.parameters for m, v in ((fast, x), (same, x), (wide, x.double()))]
        assert_within_budget(*moments, "encode")
        z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        pixels = [m.decode(v).sample for m, v in ((fast, z), (same, z), (wide, z.double()))]
        assert_within_budget(*pixels, "decode")


@pytest.mark.parametrize("name", ["clip", "dinov2"])
def test_undone_and_shared(name):
    model = made(TOWERS[name])
    classes = [type(part) for part in model.modules()]
    fast = ov3fast.optimize(model, mode="ours")
    assert fast.original is model and [type(part) for part in model.modules()] == classes
    assert ov3fast.optimize(fast, mode="ours").original is model
    pairs = zip(fast.parameters(), model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs), "one copy of the weights"
    # New weights in place reach the packed projections too.
    with torch.no_grad():
        before = fast(pixel_values=images()).last_hidden_state
        fast.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})
        after, expected = fast(pixel_values=images()), model(pixel_values=images())
    assert not torch.equal(before, after.last_hidden_state)
    torch.testing.assert_close(after.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quick_gelu_is_part_of_the_product(dtype):
    fast = ov3fast.optimize(made(TOWERS["clip_quick_gelu"]), dtype=dtype, mode="ours")
    activations = [part.activation_fn for part in fast.modules() if type(part).__name__ == "CLIPMLP"]
    assert len(activations) == 2
    for activation in activations:
        activation.register_forward_pre_hook(lambda *_: pytest.fail("called on its own"))
    with torch.no_grad():
        fast(pixel_values=images(dtype))


def test_gradients_pass():
    model = made(clip)
    fast = ov3fast.optimize(model, mode="ours")
    fast(pixel_values=images()).pooler_output.square().sum().backward()
    got = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(pixel_values=images()).pooler_output.square().sum().backward()
    assert "encoder.layers.0.self_attn.q_proj.weight" in {name.removeprefix("vision_model.") for name in got}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_mask_and_training_take_the_originals_way():
    model = made(clip)
    fast = ov3fast.optimize(model, mode="ours")
    path = next(p for p, part in model.named_modules() if type(part).__name__ == "CLIPEncoderLayer")
    layer, original = fast.get_submodule(path), model.get_submodule(path)
    x, mask = torch.randn(2, 5, 32), torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask), original(x, mask))
        assert not torch.allclose(layer(x, mask), layer(x, None))


def test_auto_takes_what_is_faster(monkeypatch):
    model, units = made(clip), []

    def measured(calls):
        assert len(calls) == 2, "eager and ours"
        if not calls[0].__defaults__:
            return [2.0, 1.5]  # the whole
        units.append(type(calls[0].__defaults__[0]).__name__)
        return [2.0, 1.0] if units[-1] == "CLIPEncoderLayer" else [1.0, 3.0]

    monkeypatch.setattr(choosing, "times", measured)
    fast = ov3fast.optimize(model, mode="auto", calibration=images())
    assert units.count("CLIPEncoderLayer") == 1, "both layers are of one shape"
    for path, choice in fast.report.choices.items():
        layer = type(model.get_submodule(path)).__name__ == "CLIPEncoderLayer"
        assert choice == ("ours" if layer else "eager"), str(fast.report)
        assert type(fast.get_submodule(path)).__name__.startswith("Fused") == layer
    assert "1500.00 ms, before 2000.00 ms" in str(fast.report)
    units.clear()
    again = ov3fast.optimize(model, mode="auto", calibration=images())
    assert again.report.choices == fast.report.choices and not units, "remembered"


def test_never_slower_as_a_whole(monkeypatch):
    model = made(dinov2)
    monkeypatch.setattr(choosing, "measure", lambda *_: ("ours", "said so"))
    monkeypatch.setattr(choosing, "times", lambda calls: [1.0, 1.2])
    fast = ov3fast.optimize(model, mode="auto")
    assert set(fast.report.choices.values()) == {"eager"} and "not faster" in str(fast.report)
    assert not any(type(part).__name__.startswith("Fused") for part in fast.modules())


def test_what_is_over_the_budget_is_not_taken(monkeypatch):
    model = made(dinov2)
    real = choosing.fusions.fuse

    def broken(unit):
        real(unit)
        unit.register_forward_hook(lambda _, __, out: out + 0.1)

    monkeypatch.setattr(choosing.fusions, "fuse", broken)
    fast = ov3fast.optimize(model, mode="auto")
    assert set(fast.report.choices.values()) == {"eager"}
    assert "over the budget" in str(fast.report)


def test_auto_runs_on_the_autoencoder_and_channels_last_is_measured(monkeypatch):
    model = made(vae)
    monkeypatch.setattr(choosing, "times", lambda calls: [2.0, 1.0, 1.5][: len(calls)])
    fast = ov3fast.optimize(model, calibration=images(side=64))
    convolutions = [part for part in fast.modules() if isinstance(part, torch.nn.Conv2d) and part.weight.shape[2] > 1]
    assert fast.report.channels_last and all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)
    assert all(c.weight.is_contiguous() for c in model.modules() if isinstance(c, torch.nn.Conv2d)), "the original is as it was"
    with torch.no_grad():
        got, expected = (m.encode(images(side=64)).latent_dist.mode() for m in (fast, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_auto_with_the_compiler(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(choosing, "Memory", lambda: type("_", (), {"get": lambda *_: None, "put": lambda *_: None})())
    model = made(clip)
    fast = ov3fast.optimize(model, calibration={"pixel_values": images()})
    assert "compile " in str(fast.report)
    with torch.no_grad():
        got, expected = (m(pixel_values=images()).last_hidden_state for m in (fast, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_own_models(model):
    fast = ov3fast.optimize(model, dtype=torch.bfloat16, mode="ours")
    assert fast.encoder.cls_token.dtype == torch.bfloat16 and fast.original is model
    assert model.encoder.cls_token.dtype == torch.float32
    same = ov3fast.optimize(model, mode="ours")
    assert list(same.state_dict()) == list(model.state_dict())
    assert same.get_vae().vae.encoder.conv_in.weight is model.get_vae().vae.encoder.conv_in.weight
    assert {"encoder.transformer.blocks.0", "decoder.transformer.blocks.0"} <= set(same.report.choices)
    ids = model.text_ids(["a red square"])
    with torch.no_grad():
        for got, expected in zip(same.encode(images()), model.encode(images()), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same.reconstruct(images()), model.reconstruct(images()), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(same.encode_text(ids), model.encode_text(ids), rtol=1e-4, atol=1e-5)
        assert same.caption(images()) == model.caption(images()), "causal blocks and caches take the original's way"


def test_own_models_are_measured(model):
    fast = ov3fast.optimize(model, calibration=images())
    assert fast.report.choices["text.transformer.blocks.0"] == "eager", "not on the images' way"
    assert "eager" in fast.report.reasons["encoder.transformer.blocks.0"]
    tower = ov3fast.optimize(VisionTower(model.encoder, model.get_vae()).eval(), mode="ours")
    with torch.no_grad():
        torch.testing.assert_close(tower.encode(images())[1], model.encode(images())[1], rtol=1e-4, atol=1e-5)


def test_an_own_autoencoder_and_those_of_sd3_and_sdxl():
    from diffusers import AutoencoderKL

    from ov3fast.models.autoencoder import Autoencoder, AutoencoderConfig
    from ov3fast.models.vae import FLUX_VAE, FrozenVAE

    small = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    sdxl = {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}
    for config in ({**FLUX_VAE, **small}, {**FLUX_VAE, **small, **sdxl}):
        own, theirs = Autoencoder(AutoencoderConfig.from_json(config)).eval(), AutoencoderKL.from_config(config).eval()
        theirs.load_state_dict(own.state_dict())
        x = images(side=64)
        with torch.no_grad():
            expected = theirs.encode(x).latent_dist.parameters
            for model in (own, theirs):
                got = ov3fast.optimize(model, mode="ours").encode(x).latent_dist.parameters
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            frozen = ov3fast.optimize(FrozenVAE(own), mode="ours")
            torch.testing.assert_close(frozen.moments(x), expected, rtol=1e-4, atol=1e-4)


def test_siglip2_takes_its_own_input():
    model = made(
        lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=8))
    )
    fast = ov3fast.optimize(model)
    assert "encoder.layers.0" in {path.removeprefix("vision_model.") for path in fast.report.choices}
    assert not any("not used" in reason for reason in fast.report.reasons.values()), str(fast.report)


def test_a_broken_memory_is_measured_again(tmp_path):
    (tmp_path / "cache").mkdir()
    for text in ("no json", "[]", json.dumps({"x": 3})):
        (tmp_path / "cache" / "optimize.json").write_text(text)
        ov3fast.optimize(made(dinov2), mode="auto")


def test_refusals():
    with pytest.raises(
        ValueError, match="optimize: Linear is not supported; it takes models of ov3fast, diffusers' AutoencoderKL"
    ):
        ov3fast.optimize(torch.nn.Linear(2, 2))
    bert = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=9)).eval()
    with pytest.raises(ValueError, match=r"BertModel \(model_type 'bert'\) is not supported"):
        ov3fast.optimize(bert)
    with pytest.raises(ValueError, match="mode must be one of auto, ours, compile, graph; got 'fast'"):
        ov3fast.optimize(clip().eval(), mode="fast")
    with pytest.raises(ValueError, match="in training mode; call eval"):
        ov3fast.optimize(clip().train())
    with pytest.raises(ValueError, match="mode 'graph' takes a model of ov3fast"):
        ov3fast.optimize(clip().eval(), mode="graph")
