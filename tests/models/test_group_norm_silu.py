import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from ov3fast.models.group_norm_silu import GroupNormSiLU, fuse_group_norm_silu
from ov3fast.models.vae import FLUX_VAE

SMALL = {**FLUX_VAE, "block_out_channels": [16, 16, 32, 32], "norm_num_groups": 4}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_fused_vae_computes_what_diffusers_does(memory_format):
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(SMALL).eval().to(memory_format=memory_format)
    images = torch.randn(2, 3, 32, 32)
    keys, before = list(vae.state_dict()), vae(images).sample
    fuse_group_norm_silu(vae)
    assert list(vae.state_dict()) == keys
    assert sum(isinstance(m, GroupNormSiLU) for m in vae.modules()) == 2 * (4 * 2 + 2 + 4 * 3 + 2) + 2
    torch.testing.assert_close(vae(images).sample, before, rtol=1e-4, atol=1e-5)


def test_other_pairs_stay():
    block = nn.Module()
    block.norm1 = block.norm2 = nn.GroupNorm(2, 4)
    block.nonlinearity = nn.GELU()
    fuse_group_norm_silu(block)
    assert isinstance(block.norm1, nn.GroupNorm)
