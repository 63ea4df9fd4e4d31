import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast.data import hash_rng
from ov3fast.data.order import Order, order_hash, permute


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_epoch_is_a_permutation(n, seed, epoch):
    samples = Order(n, seed)[epoch * n + np.arange(n)]
    assert sorted(samples.tolist()) == list(range(n))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 9), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_window_of_shards_is_a_permutation_that_keeps_few_shards_open(lengths, seed, window):
    order = Order(lengths, seed, window)
    samples = order[np.arange(2 * order.n)]
    for epoch in (samples[: order.n], samples[order.n :]):
        assert sorted(epoch.tolist()) == list(range(order.n))
        if order.window:
            shard = np.searchsorted(np.cumsum(lengths), epoch, side="right")
            seen = list(dict.fromkeys(shard.tolist()))
            for first in range(0, len(seen), window):  # each group of `window` shards is one run of positions
                here = np.isin(shard, seen[first : first + window])
                assert np.ptp(np.flatnonzero(here)) + 1 == here.sum()


def test_any_position_is_reached_without_those_before_it():
    order = Order([7, 9, 4], seed=5, window=2)
    whole = order[np.arange(60)]
    assert [int(order[np.array([t])][0]) for t in (59, 0, 31, 20)] == whole[[59, 0, 31, 20]].tolist()
    assert order[np.arange(24).reshape(2, 3, 4)].tolist() == whole[:24].reshape(2, 3, 4).tolist()


def test_epochs_and_seeds_differ():
    order = Order(500, seed=1)
    first, second, other = order[np.arange(500)], order[np.arange(500, 1000)], Order(500, seed=2)[np.arange(500)]
    assert (first == second).mean() < 0.05 and (first == other).mean() < 0.05


def test_order_is_well_mixed():
    """Neighbours are far apart and positions are hit evenly: the mean |distance| in a random permutation is n / 3."""
    n, seeds = 400, 50
    places = np.stack([permute(np.arange(n), n, seed) for seed in range(seeds)])
    assert abs(np.abs(np.diff(places, axis=1)).mean() - n / 3) < 0.03 * n
    assert np.abs(places.mean(0) - (n - 1) / 2).max() < 5 * n / np.sqrt(12 * seeds)


def test_the_sequence_never_changes_between_versions():
    """Resumed runs rely on it."""
    assert Order(10, seed=7)[np.arange(12)].tolist() == [8, 5, 4, 7, 9, 1, 0, 3, 2, 6, 7, 0]
    assert int(hash_rng.bits(1, 2, 3)) == 13970812694498109058


def test_a_billion_samples_need_no_memory():
    positions = np.array([0, 1_200_000_000 - 1, 3_000_000_000])
    samples = Order(1_200_000_000, seed=0)[positions]
    assert ((0 <= samples) & (samples < 1_200_000_000)).all() and len(set(samples.tolist())) == 3


def test_uniform_is_uniform_and_keyed():
    x = hash_rng.uniform(0, hash_rng.CROP, np.arange(20000)[:, None], np.arange(2))
    assert 0 <= x.min() and x.max() < 1
    assert np.abs(x.mean(0) - 0.5).max() < 0.01 and np.abs(x.var(0) - 1 / 12).max() < 0.002
    assert abs(np.corrcoef(x.T)[0, 1]) < 0.03
    assert not np.array_equal(x, hash_rng.uniform(0, hash_rng.FLIP, np.arange(20000)[:, None], np.arange(2)))
    assert not np.array_equal(x, hash_rng.uniform(1, hash_rng.CROP, np.arange(20000)[:, None], np.arange(2)))


def test_order_hash_tells_sequences_apart_and_continues():
    whole = order_hash(order_hash("", ["a", "b"]), ["c"])
    assert whole == order_hash(order_hash("", ["a", "b"]), ["c"]) and len(whole) == 64
    assert len({whole, order_hash("", ["a", "b", "c"]), order_hash(order_hash("", ["b", "a"]), ["c"])}) == 3
    assert order_hash("", np.array([1, 2])) == order_hash("", ["1", "2"]) != order_hash("", ["12"])


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="lengths: there are no samples"):
        Order([0, 0])
