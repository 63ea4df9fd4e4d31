import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ov3fast.evaluation import metrics


def pair(kind: str, batch: int = 3, height: int = 37, width: int = 45) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, height)[:, None] * torch.linspace(0.2, 1, width)
    waves = 0.2 * torch.sin(torch.arange(width) * torch.tensor([0.2, 0.5, 1.1])[:, None, None])
    clean = (ramp + waves).expand(batch, 3, -1, -1)
    if kind == "flat":
        clean = torch.full_like(clean, 0.5)
    noise = torch.randn(clean.shape, generator=generator) * {"noisy": 0.2, "near": 0.003, "flat": 0.01}[kind]
    return (clean + noise).clamp(0, 1), clean.clamp(0, 1).contiguous()


def by_image(images: torch.Tensor) -> list[np.ndarray]:
    return [image.permute(1, 2, 0).double().numpy() for image in images]


@pytest.mark.parametrize("kind", ["noisy", "near", "flat"])
@pytest.mark.parametrize("rounding", [True, False])
def test_psnr_equals_skimage(kind, rounding):
    images, reference = pair(kind)
    got = metrics.psnr(images, reference, rounding=rounding)
    if rounding:
        images, reference = metrics.round_to_8_bit(images.double()), metrics.round_to_8_bit(reference.double())
    expected = [
        peak_signal_noise_ratio(y, x, data_range=1.0) for x, y in zip(by_image(images), by_image(reference), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["noisy", "near", "flat"])
@pytest.mark.parametrize("data_range", [1.0, 2.0])
@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_ssim_equals_skimage(kind, data_range, window):
    images, reference = pair(kind)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False} if window == "gaussian" else {}
    expected = [
        structural_similarity(y, x, data_range=data_range, channel_axis=2, **options)
        for x, y in zip(by_image(images), by_image(reference), strict=True)
    ]
    got = metrics.ssim(images, reference, window=window, data_range=data_range, rounding=False)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_ssim_at_the_smallest_size_is_one_window():
    images, reference = pair("noisy", 1, 11, 11)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 2}
    expected = structural_similarity(by_image(reference)[0], by_image(images)[0], **options)
    assert metrics.ssim(images, reference, rounding=False).item() == pytest.approx(expected, abs=1e-6)


def test_a_known_error_has_its_psnr():
    reference = torch.full((2, 3, 8, 8), 100 / 255)
    images = reference + torch.tensor([1 / 255, 10 / 255])[:, None, None, None]
    expected = 20 * torch.log10(torch.tensor([255.0, 25.5], dtype=torch.float64))
    torch.testing.assert_close(metrics.psnr(images, reference), expected)


def test_rounding_is_to_the_nearest():
    reference = torch.full((1, 3, 12, 12), 100 / 255)
    images = reference + 0.4 / 255
    assert metrics.psnr(images, reference).item() == float("inf")
    assert metrics.psnr(images, reference, rounding=False).item() == pytest.approx(20 * np.log10(255 / 0.4), abs=1e-3)
    assert metrics.ssim(images, reference).item() == 1.0


def test_range_2_flatters():
    images, reference = pair("noisy")
    assert metrics.ssim(images, reference, data_range=2.0).mean() > metrics.ssim(images, reference).mean()


def test_figures_of_an_image_do_not_depend_on_its_batch():
    images, reference = pair("noisy")
    for metric in metrics.standard_metrics():
        together = metric(images, reference)
        alone = torch.cat([metric(images[i : i + 1], reference[i : i + 1]) for i in range(len(images))])
        torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_each_metric_carries_its_protocol():
    class Distance(torch.nn.Module):
        def forward(self, x, y):
            return (x - y).abs().amax(dim=(1, 2, 3), keepdim=True)

    found = {metric.name: metric for metric in metrics.standard_metrics(Distance())}
    assert list(found) == ["psnr", "ssim", "ssim_uniform", "lpips_style"]
    assert found["psnr"].protocol == "psnr/range=1/8-bit-rounded/mean-of-images"
    assert found["ssim"].protocol == "ssim/gaussian-11-1.5/range=1/8-bit-rounded/rgb-mean/mean-of-images"
    assert "uniform-7" in found["ssim_uniform"].protocol and "range=1" in found["ssim_uniform"].protocol
    assert "not-comparable-with-published-lpips" in found["lpips_style"].protocol
    images, reference = (metrics.round_to_8_bit(v) for v in pair("noisy"))
    # The distance sees [-1, 1]: twice the difference in [0, 1].
    torch.testing.assert_close(found["lpips_style"](images, reference), 2 * (images - reference).abs().amax((1, 2, 3)).double())


def test_the_lpips_metric_names_its_network():
    from ov3fast.models.perceptual import LPIPS

    assert metrics.lpips_metric(LPIPS("squeezenet", "caffe")).protocol.startswith("lpips-style/squeezenet-caffe/8-bit-rounded/")
    assert metrics.lpips_metric(torch.nn.Identity(), "mine").protocol.startswith("lpips-style/mine/")
    assert metrics.lpips_metric(torch.nn.Identity()).protocol.startswith("lpips-style/unnamed/")


def test_errors():
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"psnr: images and reference must be \[B, C, H, W\] of the same shape, got \(1, 3, 16, 16\)"
    ):
        metrics.psnr(x, x[..., :8])
    with pytest.raises(ValueError, match="ssim: images must be at least 11 x 11 for the gaussian window"):
        metrics.ssim(x[..., :10], x[..., :10])
    with pytest.raises(ValueError, match="ssim: window must be one of gaussian, uniform; got 'box'"):
        metrics.ssim(x, x, window="box")
