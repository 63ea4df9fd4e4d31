"""Flow matching, samplers and guidance against closed forms."""

import math

import pytest
import torch

from ov3fast.generation import flow, guidance


def gaussian(mean: float, std: float):
    """Exact velocity for data ~ N(mean, std^2): x_t is Gaussian too, and v = E[eps - x | x_t]."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.view(-1, 1, 1, 1).double()
        variance = (1 - t) ** 2 * std**2 + t**2
        return ((x - (1 - t) * mean) * (t - (1 - t) * std**2) / variance - mean).float()

    return velocity


def end(mean: float, std: float, noise: torch.Tensor) -> torch.Tensor:
    """Endpoint of the exact flow, which preserves the noise's quantiles."""
    return mean + std * noise


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_sampler_converges_to_the_closed_form(method, order):
    noise = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    errors = []
    for steps in (20, 40, 80):
        found = flow.sample(gaussian(2.0, 0.5), noise, flow.sampling_times(steps, 1.0), method)
        errors.append(float((found - end(2.0, 0.5, noise)).abs().max()))
    slope = math.log2(errors[0] / errors[2]) / 2
    assert errors[2] < {"euler": 0.05, "heun": 5e-3}[method]
    assert slope > order - 0.35, errors


def test_moments_of_samples():
    noise = flow.noise_of(1, range(400), (1, 4, 4))
    found = flow.sample(gaussian(-1.0, 2.0), noise, flow.sampling_times(100, 3.0), "heun")
    assert float(found.mean()) == pytest.approx(-1 + 2 * float(noise.mean()), abs=0.02)
    assert float(found.std()) == pytest.approx(2 * float(noise.std()), abs=0.03)


def test_a_sample_does_not_depend_on_its_batch():
    velocity, times = gaussian(0.5, 0.7), flow.sampling_times(10, 6.928)
    together = flow.sample(velocity, flow.noise_of(7, [3, 11, 5], (2, 4, 4)), times)
    alone = flow.sample(velocity, flow.noise_of(7, [11], (2, 4, 4)), times)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(flow.noise_of(7, [1], (2, 2)), flow.noise_of(8, [1], (2, 2)))


def test_times():
    assert flow.time_shift((768, 16, 16)) == pytest.approx(6.928, abs=1e-3)
    assert flow.time_shift((1024, 16, 16)) == 8
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(flow.shift(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert float(flow.sampling_times(49, 6.928, to_zero=False)[-1]) == pytest.approx(0.0069, abs=1e-4)  # RAE's last time
    uniform = flow.draw_times(torch.randn(20000), 1.0, logit_normal=False)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01) and float(uniform.var()) == pytest.approx(1 / 12, abs=0.003)
    assert float(flow.draw_times(torch.full((1,), 50.0), 2.0)) == pytest.approx(2 * 0.999 / 1.999)


def test_the_two_parametrisations_agree():
    x, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.2, 0.6, 1.0])
    x_t = flow.interpolate(x, noise, t)
    torch.testing.assert_close(flow.velocity_of(x_t, x, t), noise - x, rtol=1e-5, atol=1e-5)
    assert float(flow.velocity_loss(noise - x, x, noise, t)) == 0
    early = torch.tensor([0.01, 0.02, 0.03])  # below the clamp the target shrinks with t
    v = flow.velocity_of(flow.interpolate(x, noise, early), x, early)
    torch.testing.assert_close(v, (noise - x) * (early / 0.05).view(-1, 1, 1, 1), rtol=1e-4, atol=1e-5)
    assert float(flow.velocity_loss(v, x, noise, early, clamped=True)) == 0


def constant(value: float):
    return lambda x, t: torch.full_like(x, value)


def test_guidance_by_hand():
    x, t = torch.zeros(3, 1, 1, 1), torch.tensor([0.05, 0.1, 0.9])
    for guided in (guidance.classifier_free, guidance.autoguidance):
        v = guided(constant(2.0), constant(1.5), 1.42, (0.1, 0.5))(x, t).flatten()
        torch.testing.assert_close(v, torch.tensor([2.0, 1.5 + 1.42 * 0.5, 2.0]))
    v = guidance.internal(lambda x, t: (torch.full_like(x, 2.0), torch.full_like(x, 1.5)))(x, t).flatten()
    torch.testing.assert_close(v, torch.tensor([2.0, 2.39, 2.39]))  # 1.5 + 1.78 * 0.5 for t in [0.1, 1]
    one = guidance.classifier_free(constant(2.0), constant(-9.0), 1.0)
    torch.testing.assert_close(one(x, t), torch.full_like(x, 2.0))


def test_mistakes():
    with pytest.raises(ValueError, match="method"):
        flow.sample(constant(0.0), torch.zeros(1, 1, 1, 1), flow.sampling_times(2, 1.0), "rk4")
    with pytest.raises(ValueError, match="steps"):
        flow.sampling_times(0, 1.0)
    with pytest.raises(ValueError, match="interval"):
        guidance.internal(lambda x, t: (x, x), 1.5, (0.6, 0.2))
