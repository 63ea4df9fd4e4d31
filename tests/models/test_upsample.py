"""Upsampling folded into the convolution: the same values within the error budget, and the same parameter names."""

import pytest
import torch
import torch.nn.functional as F

from ov3fast import testing
from ov3fast.models import autoencoder, upsample
from ov3fast.models.vae import FLUX_VAE, FrozenVAE

pytestmark = pytest.mark.backend_independent


def plain(x, weight, bias):
    return (F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (8, 4)])
def test_folded_is_unfolded(dtype, height, width):
    x, weight, bias = testing.make(2, 6, height, width), testing.make(9, 6, 3, 3, seed=1), testing.make(9, seed=2)
    values = [v.to(dtype) for v in (x, weight, bias)]
    folded = upsample.upsample_convolution(values[0], upsample.phase_weights(values[1]), values[2])
    testing.Budget(lambda given: plain(*given), values).check([folded])


def test_exact_in_wide_arithmetic():
    x, weight, bias = (
        testing.make(1, 4, 6, 5).double(),
        testing.make(3, 4, 3, 3, seed=1).double(),
        testing.make(3, seed=2).double(),
    )
    x.requires_grad_()
    folded = upsample.upsample_convolution(x, upsample.phase_weights(weight), bias)
    [expected] = plain(x, weight, bias)
    torch.testing.assert_close(folded, expected, rtol=1e-12, atol=1e-12)
    upstream = testing.make(*expected.shape, seed=4).double()
    ours, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (folded, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=["own", "diffusers"])
def vae(request):
    config = {**FLUX_VAE, "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    torch.manual_seed(0)
    if request.param == "own":
        return autoencoder.Autoencoder(autoencoder.AutoencoderConfig.from_json(config))
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL.from_config(config)


def test_a_whole_decoder(vae, monkeypatch):
    """Unchanged on a CPU; folded, as on a GPU, its pictures are equal up to rounding."""
    names = list(vae.state_dict())
    z = testing.make(1, 4, 6, 5).float()
    with torch.no_grad():
        before = vae.eval().decode(z).sample
    frozen = FrozenVAE(vae)
    folds = [module for module in frozen.modules() if isinstance(module, upsample.UpsampleConvolution)]
    assert len(folds) == 1 and list(frozen.vae.state_dict()) == names
    with torch.no_grad():
        testing.assert_same_bits([frozen.vae.decode(z).sample], [frozen.vae.decode(z).sample])
        unfolded = frozen.vae.decode(z).sample
        monkeypatch.setattr(upsample.UpsampleConvolution, "folds", staticmethod(lambda x: True))
        folded = frozen.vae.decode(z).sample
    assert folds[0].phases is not None and folds[0].phases.shape[0] == 4
    for other in (unfolded, folded):
        torch.testing.assert_close(other, before, rtol=1e-4, atol=1e-5)
