"""Moments and distances: independent of batch size, order and ranks; equal to closed forms."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast.generation import frechet
from ov3fast.generation.moments import ElementMoments, FeatureMoments

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def values():
    generator = torch.Generator().manual_seed(0)
    return 3 + 0.1 * torch.randn(211, 12, generator=generator, dtype=torch.float64)


def test_one_pass_equals_two(values):
    moments = ElementMoments.of(values.view(211, 3, 2, 2))
    torch.testing.assert_close(moments.mean, values.mean(0).view(3, 2, 2), **EXACT)
    torch.testing.assert_close(moments.var, values.var(0, correction=0).view(3, 2, 2), **EXACT)
    torch.testing.assert_close(FeatureMoments.of(values).covariance, values.T.cov(), **EXACT)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 211))
def test_order_and_batch_do_not_matter(values, random, batch):
    order = random.sample(range(len(values)), len(values))
    for kind in (ElementMoments, FeatureMoments):
        whole, parts = kind.of(values), kind()
        for rows in values[order].split(batch):
            parts.add(rows)
        torch.testing.assert_close((parts.mean, parts.sum), (whole.mean, whole.sum), **EXACT)
        assert parts.count == whole.count


def test_seven_shards_merge_in_any_order(values):
    shards = [FeatureMoments.of(part) for part in values.tensor_split(7)]
    forwards, backwards = FeatureMoments(), FeatureMoments()
    for one, other in zip(shards, reversed(shards), strict=True):
        forwards.merge(one)
        backwards.merge(other)
    other = FeatureMoments.of(values * 1.5 + 1)
    assert frechet.frechet_of(forwards, other) == pytest.approx(frechet.frechet_of(backwards, other), rel=1e-9)


def _rank(rank: int, store: str, values: torch.Tensor, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    moments = FeatureMoments.of(values[rank::2]).all_reduce()
    torch.save((moments.count, moments.mean, moments.sum), f"{out}{rank}")
    dist.destroy_process_group()


def test_two_ranks(values, tmp_path):
    mp.spawn(_rank, (str(tmp_path / "store"), values, str(tmp_path / "rank")), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, second, strict=True))
    whole = FeatureMoments.of(values)
    torch.testing.assert_close(first[1:], (whole.mean, whole.sum), **EXACT)
    assert first[0] == whole.count


def test_frechet_equals_the_matrix_square_root(values):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = FeatureMoments.of(values), FeatureMoments.of(values.flip(0)[:100] @ torch.randn(12, 12, dtype=torch.float64))
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    assert frechet.frechet_of(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_of_what_commutes():
    """Diagonal covariances give |m1 - m2|^2 + sum (sigma1 - sigma2)^2, equal sets 0."""
    mean, sigma = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    found = frechet.frechet_distance(mean, sigma.square().diag(), mean + 1, (2 * sigma).square().diag())
    assert found == pytest.approx(3 + float(sigma.square().sum()))
    assert frechet.frechet_distance(mean, sigma.diag(), mean, sigma.diag()) == pytest.approx(0, abs=1e-9)


def test_fewer_samples_than_dimensions():
    few, many = torch.randn(5, 30, dtype=torch.float64), torch.randn(400, 30, dtype=torch.float64)
    distance = frechet.frechet_of(FeatureMoments.of(few), FeatureMoments.of(many))
    assert np.isfinite(distance) and distance > 0


def test_inception_score_by_hand():
    """K equally frequent classes, all predicted with certainty, score K; identical predictions score 1."""
    logits = torch.eye(4).repeat(25, 1) * 1e3
    assert frechet.inception_score(logits, splits=5)[0] == pytest.approx(4)
    assert frechet.inception_score(torch.zeros(20, 4), splits=2) == (pytest.approx(1), pytest.approx(0))


def test_precision_and_recall_by_hand():
    """Generated points cover one of the reference's two clusters: precision 1, recall 1/2."""
    torch.manual_seed(0)
    cluster = torch.randn(40, 2)
    assert frechet.precision_recall(cluster, torch.cat([cluster + 1e-3, cluster + 1000])) == (1.0, 0.5)
    assert frechet.precision_recall(cluster + 1e4, cluster) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ElementMoments().add(torch.zeros(2, 3)).add(torch.zeros(2, 4)), "one shape"),
        (lambda: ElementMoments.of(torch.tensor([1.0, float("nan")])), "not finite"),
        (lambda: FeatureMoments.of(torch.zeros(2, 3, 4)), r"\[N, D\]"),
        (lambda: ElementMoments().var, "no sample"),
        (lambda: FeatureMoments.of(torch.zeros(1, 3)).covariance, "at least 2"),
        (lambda: frechet.inception_score(torch.zeros(3, 2)), "splits"),
        (lambda: frechet.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), "generated"),
        (lambda: frechet.frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)), "one width"),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(ValueError, match=words):
        call()
