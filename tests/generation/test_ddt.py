"""The generators: parameter counts of the published ones, shapes, conditions, positions, and that they learn."""

import pytest
import torch

from ov3fast.generation import flow, layers
from ov3fast.generation.ddt import GeneratorConfig, build_generator, generator_config

KINDS = [(False, "class"), (False, "text"), (True, "class"), (True, "text")]


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
    """RAE, table 7: DiT^DH-XL has 839 M parameters for tokens of 768 channels. By hand, for a block: 4 + 8 + 6 squares of its width."""
    assert count(generator_config("XL")) == pytest.approx(839, abs=1)
    by_hand = (28 * 18 * 1152**2 + 2 * 18 * 2048**2) / 1e6
    assert by_hand < count(generator_config("XL")) < 1.03 * by_hand
    assert count(generator_config("S")) < count(generator_config("XL")) < count(generator_config("XL-context"))


@pytest.mark.parametrize(("in_context", "condition"), KINDS)
def test_shapes_and_gradients(in_context, condition):
    generator, labels = small(in_context, condition)
    with torch.no_grad():  # what starts at zero would hide the rest
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


def test_rotation_depends_on_the_distance_alone():
    """<R(a) q, R(b) k> is a function of b - a, along the rows and along the columns."""
    angles = layers.rotary_angles(5, 5, 16).double()
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    turned_q, turned_k = (layers.rotate(x.expand(1, 25, 1, 16), angles)[0, :, 0] for x in (q, k))
    products = (turned_q @ turned_k.T).view(5, 5, 5, 5)
    torch.testing.assert_close(products[0, 0, 2, 1], products[2, 3, 4, 4])
    torch.testing.assert_close(products[1, 2, 0, 3], products[4, 1, 3, 2])
    assert not torch.allclose(products[0, 0, 2, 1], products[0, 0, 1, 2])
    assert layers.rotary_angles(2, 2, 8, prefix=3)[:3].abs().sum() == 0


@pytest.mark.full
@pytest.mark.parametrize("in_context", [False, True])
def test_it_learns_two_classes(in_context):
    """Two constant pictures: after some steps samples are nearer to their class's picture than to the other's."""
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
