"""The frozen VAE: latents in both conventions, no gradients for its weights, errors."""

import pytest
import torch

from ov3fast import ops
from ov3fast.models import vae as vae_module
from ov3fast.models.vae import FLUX_VAE, FrozenVAE, check_convention, from_latents, to_latents


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_flux_layout():
    assert (FLUX_VAE["scaling_factor"], FLUX_VAE["shift_factor"]) == (0.3611, 0.1159)
    assert FLUX_VAE["block_out_channels"] == [128, 256, 512, 512]


def test_conventions_are_inverses_and_differ_by_the_shift():
    z = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(to_latents(z, "openvision3", 0.3611, 0.1159), z * 0.3611)
    torch.testing.assert_close(to_latents(z, "flux", 0.3611, 0.1159), (z - 0.1159) * 0.3611)
    for name in ("openvision3", "flux"):
        torch.testing.assert_close(from_latents(to_latents(z, name, 0.3611, 0.1159), name, 0.3611, 0.1159), z)


def test_moments_and_latents(flux_vae, images):
    assert (flux_vae.channels, flux_vae.stride) == (16, 8)
    moments = flux_vae.moments(images)
    assert moments.shape == (2, 32, 4, 2) and not moments.requires_grad
    posterior = flux_vae.vae.encode(images).latent_dist
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], 1))
    torch.testing.assert_close(flux_vae.encode(images), posterior.mean * 0.3611)
    torch.testing.assert_close(flux_vae.encode(images, convention="flux"), (posterior.mean - 0.1159) * 0.3611)


def test_sampling_follows_the_operators_stream(flux_vae, images):
    rng = ops.random.make_rng(3, 5)
    mean, logvar = flux_vae.moments(images).chunk(2, 1)
    expected = (mean + (0.5 * logvar).exp() * ops.random.normal(mean.shape, rng)) * 0.3611
    drawn = flux_vae.encode(images, posterior="sample", rng=rng)
    torch.testing.assert_close(drawn, expected)
    assert torch.equal(drawn, flux_vae.encode(images, posterior="sample", rng=rng))
    assert not torch.allclose(drawn, flux_vae.encode(images), atol=1e-3)


def test_decoding_inverts_the_convention_and_passes_gradients(flux_vae):
    z = torch.randn(1, 16, 2, 2)
    expected = flux_vae.vae.decode(z).sample
    for name in ("openvision3", "flux"):
        latents = to_latents(z, name, 0.3611, 0.1159).requires_grad_()
        images = flux_vae.decode(latents, name)
        assert images.shape == (1, 3, 16, 16)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        images.square().sum().backward()
        assert latents.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in flux_vae.parameters())


def test_stays_frozen_and_in_its_own_precision(flux_vae, images):
    flux_vae.train()
    assert not flux_vae.training and not flux_vae.vae.training
    exact = flux_vae.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flux_vae.encode(images), exact)
        assert flux_vae.decode(exact).dtype == torch.float32
    assert torch.equal(flux_vae.encode(images.double()), exact)


def test_bound_to_one_convention(make_vae, images):
    free = make_vae()
    assert free.convention("flux") == "flux" and free.convention() == "openvision3"
    bound = FrozenVAE(free.vae, latent_convention="flux")
    assert torch.equal(bound.encode(images), free.encode(images, convention="flux"))
    for call in (
        lambda: bound.encode(images, convention="openvision3"),
        lambda: bound.decode(torch.zeros(1, 16, 2, 2), "openvision3"),
    ):
        with pytest.raises(ValueError, match="'openvision3' can't be mixed with 'flux'"):
            call()


def test_flux_convention_needs_a_shift(make_vae, images):
    with pytest.raises(ValueError, match="needs a VAE with a shift_factor"):
        make_vae(shift_factor=None).encode(images, convention="flux")
    assert make_vae(shift_factor=None).encode(images).shape == (2, 16, 4, 2)


def test_from_pretrained_folder_and_subfolder(flux_vae, images, tmp_path):
    flux_vae.vae.save_pretrained(tmp_path / "model" / "vae")
    for loaded in (
        FrozenVAE.from_pretrained(tmp_path / "model", subfolder="vae"),
        FrozenVAE.from_pretrained(tmp_path / "model"),
        FrozenVAE.from_pretrained(str(tmp_path / "model" / "vae"), latent_convention="openvision3"),
    ):
        assert torch.equal(loaded.encode(images), flux_vae.encode(images))
    half = FrozenVAE.from_pretrained(tmp_path / "model", subfolder="vae", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.encode(images).dtype == torch.bfloat16


def test_the_packages_own(flux_vae, images, tmp_path, monkeypatch):
    monkeypatch.setattr(vae_module, "small_vae_folder", lambda: tmp_path / "small")
    with pytest.raises(FileNotFoundError, match="the package's small VAE is missing"):
        FrozenVAE.from_pretrained("small")
    flux_vae.vae.save_pretrained(tmp_path / "small")
    assert torch.equal(FrozenVAE.from_pretrained("small").encode(images), flux_vae.encode(images))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda v: v.encode(torch.zeros(1, 3, 30, 32)), ValueError, r"multiples of 8, got \(1, 3, 30, 32\)"),
        (lambda v: v.encode(torch.zeros(1, 1, 32, 32)), ValueError, r"images must be \[B, 3, H, W\]"),
        (
            lambda v: v.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
            TypeError,
            r"floating point in \[-1, 1\], got torch.uint8",
        ),
        (
            lambda v: v.encode(torch.zeros(1, 3, 32, 32), posterior="mode"),
            ValueError,
            "posterior must be 'mean' or 'sample', got 'mode'",
        ),
        (lambda v: v.encode(torch.zeros(1, 3, 32, 32), posterior="sample"), ValueError, 'posterior="sample" needs rng'),
        (lambda v: v.encode(torch.zeros(1, 3, 32, 32), convention="sdxl"), ValueError, "one of openvision3, flux; got 'sdxl'"),
        (lambda v: v.decode(torch.zeros(1, 4, 4, 4)), ValueError, r"latents must be \[B, 16, h, w\], got \(1, 4, 4, 4\)"),
        (lambda v: FrozenVAE.from_pretrained("/nowhere/vae"), FileNotFoundError, "no such folder or file /nowhere/vae"),
        (lambda v: check_convention("flux", "openvision3"), ValueError, "can't be mixed"),
    ],
)
def test_errors(flux_vae, call, kind, message):
    with pytest.raises(kind, match=message) as error:
        call(flux_vae)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_vae(tmp_path):
    for subfolder in (None, "vae"):
        with pytest.raises(FileNotFoundError, match=r"has no config\.json; give the folder of a diffusers AutoencoderKL"):
            FrozenVAE.from_pretrained(tmp_path, subfolder)


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"black/flux is no local folder, and the hub could not .*\(no route\)"
    ) as error:
        FrozenVAE.from_pretrained("black/flux", "vae")
    assert "\n" not in str(error.value)


def test_cut_weights_are_one_line(flux_vae, tmp_path):
    flux_vae.vae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="VAE: can't load") as error:
        FrozenVAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
