import gzip

import pytest
import torch

from ov3fast.evaluation import probe


def blobs(count: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % 5
    return centres[labels] + spread * torch.randn(count, 12, generator=generator), labels


def test_separable_features_are_read():
    table = probe.linear_probe(*blobs(200, 0.1), *blobs(100, 0.1, seed=1))
    assert table["accuracy"] == table["train_accuracy"] == 1.0
    assert (table["chance"], table["train"], table["test"], table["features"]) == (0.2, 200, 100, 12)


def test_noise_stays_at_chance():
    features = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (400,), generator=torch.Generator().manual_seed(1))
    table = probe.linear_probe(features[:200], labels[:200], features[200:], labels[200:])
    assert 0.08 < table["accuracy"] < 0.35


def test_the_optimum_is_reached():
    """At the minimum the gradient is zero: sum_n (p_n - y_n) x_n / N + l2 W = 0."""
    features, labels = blobs(150, 1.0)
    model = probe._fit(features, labels, 5, 1e-2)
    x = (features.double() - model.mean) / model.deviation
    residual = torch.softmax(x @ model.weight.T + model.bias, 1) - torch.nn.functional.one_hot(labels, 5)
    assert (residual.T @ x / len(x) + 1e-2 * model.weight).abs().max() < 1e-4
    assert residual.mean(0).abs().max() < 1e-4


def test_same_features_same_figure_whatever_the_scale():
    train, test = blobs(150, 1.5), blobs(100, 1.5, seed=1)
    first = probe.linear_probe(*train, *test)
    assert probe.linear_probe(*train, *test) == first
    scaled = probe.linear_probe(train[0] * 1000, train[1], test[0] * 1000, test[1])
    assert scaled["accuracy"] == pytest.approx(first["accuracy"], abs=0.011)


def test_the_strength_is_chosen_without_the_test_set():
    train, test = blobs(150, 3.0), blobs(100, 3.0, seed=1)
    table = probe.linear_probe(*train, *test)
    assert table["l2"] == probe.linear_probe(*train, test[0], test[1].roll(1))["l2"]
    assert probe.linear_probe(*train, *test, strengths=(0.5,))["l2"] == 0.5


def test_constant_features_are_left_out():
    train, labels = blobs(150, 0.1)
    test, test_labels = blobs(50, 0.1, seed=1)
    train, test = (torch.cat([f, torch.full((len(f), 1), 0.1)], 1) for f in (train, test))
    assert probe.linear_probe(train, labels, test, test_labels)["accuracy"] == 1.0


def test_works_under_inference_mode():
    with torch.inference_mode():
        train, test = blobs(60, 0.1), blobs(30, 0.1, seed=1)
        assert probe.linear_probe(*train, *test)["accuracy"] == 1.0


def test_fashion_mnist_is_read_and_stratified(fashion_folder):
    train, test = probe.fashion_mnist(fashion_folder, 30, 20)
    assert train.images.shape == (30, 28, 28) and train.labels.bincount().tolist() == [3] * 10
    assert test.labels.bincount().tolist() == [2] * 10
    # The first picture's label is 9, and row 2 * 9 + 3 is the bright one.
    assert train.labels[0] == 59 % 10 and (train.images[0, 21] == 220).all()
    flat = [part.images.flatten(1).float() for part in (train, test)]
    assert probe.linear_probe(flat[0], train.labels, flat[1], test.labels)["accuracy"] == 1.0


def test_grey_to_rgb():
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[1] = 255
    pictures = probe.grey_to_rgb(images, 64)
    assert pictures.shape == (2, 3, 64, 64) and pictures.dtype == torch.float32
    torch.testing.assert_close(pictures, torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 64, 64))


def test_errors(tmp_path, fashion_folder):
    with pytest.raises(FileNotFoundError, match="has no train-images-idx3-ubyte.gz; `ov3fast data demo` fetches the set"):
        probe.fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match="count 3000 over 10 classes needs more rows of a class than there are"):
        probe.fashion_mnist(fashion_folder, 3000, 10)
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09abc"))
    with pytest.raises(ValueError, match="holds 3 values, but its header says 9"):
        probe.read_idx(broken)
    broken.write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(ValueError, match="is not an idx file"):
        probe.read_idx(broken)
    with pytest.raises(ValueError, match="test holds non-finite features"):
        probe.linear_probe(*blobs(50, 1.0), torch.full((5, 12), torch.nan), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"train takes features \[N, E\] and labels \[N\]"):
        probe.linear_probe(
            torch.ones(5, 2), torch.zeros(4, dtype=torch.long), torch.ones(5, 2), torch.zeros(5, dtype=torch.long)
        )
