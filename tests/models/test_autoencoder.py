"""The package's autoencoder against diffusers' AutoencoderKL: names, bits, folders, and what is left to diffusers."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ov3fast.models.autoencoder import WEIGHT_FILES, Autoencoder, AutoencoderConfig, supports
from ov3fast.models.vae import FLUX_VAE, FrozenVAE

TINY = {**FLUX_VAE, "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
CONFIGS = {
    "flux": {**FLUX_VAE, "block_out_channels": [16, 16, 32, 32], "norm_num_groups": 4},
    "stable-diffusion": {**TINY, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True},
    "no attention": {**TINY, "mid_block_add_attention": False},
    "one block": {
        "block_out_channels": [8],
        "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_and_bits_are_those_of_diffusers(config, memory_format, dtype):
    torch.manual_seed(0)
    theirs = FrozenVAE(AutoencoderKL.from_config(config)).to(memory_format=memory_format, dtype=dtype)
    torch.manual_seed(0)
    ours = FrozenVAE.from_config(config).to(memory_format=memory_format, dtype=dtype)
    assert isinstance(ours.vae, Autoencoder)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():  # the same seed gives the same weights
        assert torch.equal(ours.state_dict()[name], value), name
    images = torch.rand(3, 3, 32, 48) * 2 - 1
    assert torch.equal(ours.moments(images), theirs.moments(images))
    latents = ours.encode(images)
    assert torch.equal(ours.decode(latents), theirs.decode(latents))
    assert (ours.channels, ours.stride, ours.scaling_factor, ours.shift_factor) == (
        theirs.channels,
        theirs.stride,
        theirs.scaling_factor,
        theirs.shift_factor,
    )


def test_gradients_are_those_of_diffusers():
    torch.manual_seed(0)
    theirs = FrozenVAE(AutoencoderKL.from_config(TINY))
    ours = FrozenVAE.from_config(TINY)
    ours.load_state_dict(theirs.state_dict())
    grads = []
    for vae in (ours, theirs):
        latents = torch.linspace(-1, 1, 2 * 16 * 4 * 4).view(2, 16, 4, 4).requires_grad_()
        vae.decode(latents).square().sum().backward()
        grads.append(latents.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_reads_the_others_folders(config, tmp_path):
    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = FrozenVAE.from_pretrained(tmp_path / "theirs").vae
    assert isinstance(ours, Autoencoder)
    ours.save_pretrained(tmp_path / "ours")
    again = AutoencoderKL.from_pretrained(tmp_path / "ours")
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value) and torch.equal(again.state_dict()[name], value)
    for name in ("scaling_factor", "shift_factor", "latent_channels", "force_upcast"):
        assert again.config[name] == theirs.config[name]


def test_names_of_before_diffusers_0_12(tmp_path):
    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config(TINY)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHT_FILES[0])
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert any(".proj_attn." in name for name in state)
    save_file(state, tmp_path / WEIGHT_FILES[0], {"format": "pt"})
    ours = FrozenVAE.from_pretrained(tmp_path).vae
    assert isinstance(ours, Autoencoder)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_weights_that_do_not_fit_the_config_are_one_line(tmp_path):
    Autoencoder(AutoencoderConfig.from_json(TINY)).save_pretrained(tmp_path)
    for changed, message in (
        ({"block_out_channels": [8, 8, 16, 32]}, "its weights: missing key|its weights: .* must have shape"),
        ({"block_out_channels": 8}, "int"),
        ({"norm_num_groups": 3}, "divisible"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**TINY, **changed}))
        with pytest.raises(ValueError, match=f"VAE: can't load .*({message})") as error:
            FrozenVAE.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]},
        {"act_fn": "relu"},
        {"a_field_of_a_later_diffusers": 1},
        {"_class_name": "AutoencoderTiny"},
    ],
)
def test_other_layouts_are_left_to_diffusers(change):
    assert supports(TINY) and not supports({**TINY, **change})


def test_diffusers_reads_other_layouts(tmp_path):
    torch.manual_seed(0)
    other = AutoencoderKL.from_config({**TINY, "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]})
    other.save_pretrained(tmp_path)
    vae = FrozenVAE.from_pretrained(tmp_path)
    assert isinstance(vae.vae, AutoencoderKL)
    assert vae.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16, 2, 2)


def test_without_diffusers_other_layouts_name_the_extra(monkeypatch):
    other = {**TINY, "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]}
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install 'ov3fast\[diffusers\]'"):
        FrozenVAE.from_config(other)
    assert isinstance(FrozenVAE.from_config(TINY).vae, Autoencoder)


@pytest.mark.parametrize("how", [{"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "20KB"}], ids=str)
def test_other_files(how, tmp_path):
    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config(TINY)
    theirs.save_pretrained(tmp_path, **how)
    ours = FrozenVAE.from_pretrained(tmp_path, variant=how.get("variant")).vae
    assert isinstance(ours, Autoencoder)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_the_small_vae_loads_without_diffusers():
    code = """
import sys
from ov3fast.models.vae import FrozenVAE
FrozenVAE.from_pretrained("small")
print([name for name in ("diffusers", "transformers", "torch._dynamo") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
