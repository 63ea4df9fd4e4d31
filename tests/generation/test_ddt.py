"""Generators: published parameter counts, shapes, conditioning, positions, FLOPs, int8 and learning."""

import dataclasses

import pytest
import torch

from ov3fast import ops
from ov3fast.generation import flow, layers, plan
from ov3fast.generation.ddt import GeneratorConfig, build_generator, generator_config
from ov3fast.generation.saved import SavedGenerator
from ov3fast.generation.statistics import LatentStatistics
from ov3fast.inference.int8 import unavailable_reason
from ov3fast.recipes.generate import GENERATE_RECIPES
from ov3fast.training.cluster import CHIPS

KINDS = [(False, "class"), (False, "text"), (True, "class"), (True, "text")]


def filled(generator):
    """Add noise to all parameters, including zero-initialised ones."""
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return generator


def small(in_context: bool, condition: str):
    torch.manual_seed(0)
    fields = {"classes": 5} if condition == "class" else {"classes": 0, "text_width": 12}
    generator = build_generator(GeneratorConfig(6, 4, 4, (32, 48), (3, 2), (2, 2), in_context=in_context, **fields))
    labels = torch.tensor([1, 4]) if condition == "class" else torch.randn(2, 3, 12)
    return generator, labels


def count(config: GeneratorConfig) -> float:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_generator(config).parameters()) / 1e6


def test_parameters_of_the_published_ones():
    """RAE, table 7: DiT^DH-XL has 839 M parameters for 768-channel tokens. By hand: a block has (4 + 8 + 6) width^2."""
    assert count(generator_config("XL")) == pytest.approx(839, abs=1)
    by_hand = (28 * 18 * 1152**2 + 2 * 18 * 2048**2) / 1e6
    assert by_hand < count(generator_config("XL")) < 1.03 * by_hand
    assert count(generator_config("S")) < count(generator_config("XL")) < count(generator_config("XL-context"))


@pytest.mark.parametrize(("in_context", "condition"), KINDS)
def test_shapes_and_gradients(in_context, condition):
    generator, labels = small(in_context, condition)
    with torch.no_grad():  # zero-initialised layers would block the other gradients
        for parameter in generator.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    outputs = generator(torch.randn(2, 6, 4, 4), torch.tensor([0.3, 0.9]), generator.drop(labels, torch.tensor([True, False])))
    assert [tuple(output.shape) for output in outputs] == [(2, 6, 4, 4)] * (2 if in_context else 1)
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in generator.parameters())


@pytest.mark.parametrize(("in_context", "condition"), KINDS)
def test_condition_and_time_matter(in_context, condition):
    generator, labels = small(in_context, condition)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, t = torch.randn(1, 6, 4, 4).expand(2, -1, -1, -1), torch.tensor([0.5, 0.5])
        first, second = generator(x, t, labels)[0]
        assert not torch.allclose(first, second)
        assert not torch.allclose(generator(x, t, generator.null(labels))[0][0], first)
        assert not torch.allclose(generator(x, t / 2, labels)[0][0], first)


def test_a_velocity_network_starts_at_zero():
    generator, labels = small(False, "class")
    assert not generator(torch.randn(2, 6, 4, 4), torch.rand(2), labels)[0].any()


def test_a_prediction_of_x_becomes_the_velocity_that_ends_there():
    """One Euler step from t to 0 ends at the final layer's output; below SMALLEST_T, t is clamped."""
    torch.manual_seed(0)
    config = GeneratorConfig(6, 4, 4, (32, 48), (2, 1), (2, 2), classes=5, predicts_x=True)
    of_x = filled(build_generator(config))
    of_velocity = build_generator(dataclasses.replace(config, predicts_x=False))
    of_velocity.load_state_dict(of_x.state_dict())
    x, labels = torch.randn(2, 6, 4, 4), torch.tensor([1, 4])
    for t in (0.7, 0.01):
        times = torch.full((2,), t)
        with torch.no_grad():
            v, x_hat = of_x(x, times, labels)[0], of_velocity(x, times, labels)[0]
        torch.testing.assert_close(v * max(t, flow.SMALLEST_T), x - x_hat, rtol=1e-5, atol=1e-5)
    assert config.clamped and not of_velocity.config.clamped


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("in_context", [False, True])
def test_autocast_warns_of_nothing(in_context):
    generator, labels = small(in_context, "class")
    with torch.autocast("cpu", torch.bfloat16):
        generator(torch.randn(2, 6, 4, 4), torch.tensor([0.3, 0.9]), labels)[0].sum().backward()


def test_flops_and_what_they_take():
    """By hand, for four tokens: the trunk is conditioned by one row, the head by one per token."""
    config = GeneratorConfig(6, 2, 2, (32, 48), (3, 2), (2, 2), classes=5)
    hidden, wide, n = int(8 / 3 * 32), int(8 / 3 * 48), 4
    trunk = n * (4 * 32**2 + 3 * 32 * hidden) + 6 * 32**2
    head = n * (4 * 48**2 + 3 * 48 * wide + 6 * 48**2)
    ends = n * (6 * 32 + 6 * 48 + 32 * 48 + 2 * 48**2 + 48 * 6) + 512 * 32 + 32**2
    attention = 4 * n * n * (3 * 32 + 2 * 48)
    assert plan.forward_flops(build_generator(config)) == 2 * (3 * trunk + 2 * head + ends) + attention
    made = plan.plan_generator(GENERATE_RECIPES["generate-base"], 8, CHIPS["h100"], mfu=0.5, price=2.0)
    assert made.gpu_hours == pytest.approx(3 * made.forward_flops * made.samples / (0.5 * 989e12) / 3600)
    assert made.days == pytest.approx(made.gpu_hours / 8 / 24) and made.parameters == pytest.approx(839e6, rel=2e-3)
    assert made.samples == pytest.approx(80 * 1_281_167, rel=1e-4)
    with pytest.raises(ValueError, match="mfu"):
        plan.plan_generator(GENERATE_RECIPES["generate-base"], 8, CHIPS["h100"], mfu=0.0)


@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
def test_int8_samples_are_near_and_do_not_depend_on_their_batch():
    torch.manual_seed(0)
    config = GeneratorConfig(8, 4, 4, (64, 96), (3, 2), (2, 2), classes=5)
    generator = filled(build_generator(config)).eval().requires_grad_(False)
    one = torch.ones(8, 4, 4, dtype=torch.float64)
    saved = SavedGenerator(generator, LatentStatistics(0 * one, one, {}), "", list("abcde"), 1.0)
    labels = torch.tensor([0, 3, 4])
    exact = saved.sample(labels, range(3), steps=8)
    for precision, bound in (("bf16", 0.05), ("int8", 0.15)):
        found = saved.sample(labels, range(3), steps=8, precision=precision)
        assert 0 < float((found - exact).norm() / exact.norm()) < bound, precision
        alone = saved.sample(labels[1:2], [1], steps=8, precision=precision)
        assert float((alone[0] - found[1]).norm() / exact[1].norm()) < bound / 5, precision


def test_rotation_depends_on_the_distance_alone():
    """<R(a) q, R(b) k> depends only on b - a, in rows and columns."""
    angles = layers.rotary_angles(5, 5, 16).double()
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    turned_q, turned_k, _ = ops.rope(torch.stack([q, k, k], 2).expand(1, 25, 3, 1, 16), *layers.rotation(angles))[
        0, :, :, 0
    ].unbind(1)
    products = (turned_q @ turned_k.T).view(5, 5, 5, 5)
    torch.testing.assert_close(products[0, 0, 2, 1], products[2, 3, 4, 4])
    torch.testing.assert_close(products[1, 2, 0, 3], products[4, 1, 3, 2])
    assert not torch.allclose(products[0, 0, 2, 1], products[0, 0, 1, 2])
    assert layers.rotary_angles(2, 2, 8, prefix=3)[:3].abs().sum() == 0


def test_the_block_is_its_formula():
    """Against plain PyTorch, with torch's own RMS norm and the rotation in complex numbers."""
    torch.manual_seed(0)
    block = layers.Block(32, 2, conditioned=False, qk_norm=True).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, angles = torch.randn(2, 6, 32, dtype=torch.float64), layers.rotary_angles(2, 3, 16).double()

    def norm(x, weight):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, layers.EPS)

    def turned(x):
        numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(numbers).flatten(-2).transpose(1, 2)

    q, k, v = block.attn.qkv(norm(x, block.norm1.weight)).unflatten(-1, (3, 2, 16)).unbind(2)
    q, k = (turned(norm(value, weight)) for value, weight in ((q, block.attn.q_norm.weight), (k, block.attn.k_norm.weight)))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
    h = x + block.attn.proj(out)
    gate, value = block.mlp.w12(norm(h, block.norm2.weight)).chunk(2, -1)
    expected = h + block.mlp.w3(torch.nn.functional.silu(gate) * value)
    torch.testing.assert_close(block(x, layers.rotation(angles)), expected)


@pytest.mark.full
@pytest.mark.parametrize("in_context", [False, True])
def test_it_learns_two_classes(in_context):
    """Two constant images: after a short training, samples are closer to their own class's image than to the other."""
    generator, _ = small(in_context, "class")
    data = torch.stack([torch.full((6, 4, 4), 1.0), torch.full((6, 4, 4), -1.0)])
    optimizer = torch.optim.AdamW(generator.parameters(), 3e-3)
    torch.manual_seed(1)
    for _ in range(200):
        labels = torch.randint(0, 2, (16,))
        x, noise, t = data[labels], torch.randn(16, 6, 4, 4), flow.draw_times(torch.randn(16), 3.0)
        outputs = generator(flow.interpolate(x, noise, t), t, labels)
        loss = sum(flow.velocity_loss(v, x, noise, t, clamped=in_context) for v in outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for label, sign in ((0, 1), (1, -1)):
            labels = torch.full((4,), label)
            found = flow.sample(generator.denoiser(labels), flow.noise_of(0, range(4), (6, 4, 4)), flow.sampling_times(10, 3.0))
            assert (sign * found.mean((1, 2, 3)) > 0.3).all(), found.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: generator_config("L"), "size must be one of"),
        (lambda: generator_config("S", channels=4096), "at least as wide"),
        (lambda: GeneratorConfig(4, 2, 2, (32, 32), (1, 1), (2, 2), classes=0), "one of them"),
        (lambda: GeneratorConfig(4, 2, 2, (36, 32), (1, 1), (2, 2)), "multiple of 4"),
        (lambda: small(False, "class")[0](torch.zeros(1, 6, 2, 2), torch.zeros(1), torch.tensor([0])), "x_t must have shape"),
        (lambda: small(False, "class")[0](torch.zeros(1, 6, 4, 4), torch.zeros(1), torch.zeros(1)), "labels must be integers"),
        (lambda: small(True, "text")[0](torch.zeros(1, 6, 4, 4), torch.zeros(1), torch.zeros(1, 3, 5)), "text must have shape"),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(ValueError, match=words):
        call()
