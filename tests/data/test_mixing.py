"""Custom sources, exact mixing, threads, and runs with a changing number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ov3fast.data import DataConfig, DataError, Loader, Sample, SampleError, SampleSource, Skip, SourceConfig, mixing


class Numbers:
    """n samples in shards of equal length; sample i has the key i."""

    def __init__(self, n=60, shards=1):
        self.n, self.lengths = n, [n // shards] * shards

    def __len__(self):
        return self.n

    def keys(self, indices):
        return [str(i) for i in indices]

    def read(self, index, decode=True):
        if index == 13:
            raise SampleError(Skip(index, "13", "broken_image", "unlucky"))
        image = Image.new("RGB", (8, 8), (index % 256, 0, 0)) if decode else None
        return Sample(str(index), image, {"caption": f"number {index}"}, {})


def numbers(argument="60"):
    return Numbers(int(argument))


def nothing():
    return object()


def internet():
    """1.2 billion samples in 10^5 shards of unequal length."""
    source = Numbers.__new__(Numbers)
    source.lengths = (11_000 + np.arange(100_000) * 7919 % 2001).tolist()
    source.n = sum(source.lengths)
    return source


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "some_reader", sys.modules[__name__])


def source(rest="numbers", **options):
    return SourceConfig(f"source:some_reader:{rest}", captions=(("caption", 1.0),), **options)


def test_a_source_of_one_s_own():
    assert isinstance(Numbers(), SampleSource)
    loader = Loader(DataConfig(sources=(source(),), skip_budget=0.5), image_size=8, batch_size=10)
    with pytest.warns(match="skipped 13: broken_image"):
        batches = list(loader.batches(stop=6))
    assert sorted(np.concatenate([batch.planned for batch in batches]).tolist()) == list(range(60))
    for batch in batches:
        assert batch.keys == [str(i) for i in batch.index.tolist()] and batch.text == [f"number {key}" for key in batch.keys]
    assert Loader(DataConfig(sources=(source("numbers:7"),)), image_size=8, batch_size=1).samples == 7


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent:x", "can't be imported"),
        ("some_reader:absent", "can't be imported"),
        ("some_reader:nothing", "lacks one of __len__, keys and read"),
    ],
)
def test_what_is_no_source_is_named(path, words):
    with pytest.raises(DataError, match=words):
        Loader(DataConfig(sources=(SourceConfig(f"source:{path}"),)), image_size=8, batch_size=1)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 10**13))
@example([1, 1, 1, 11], 92)
@example([1, 1, 1, 1, 1, 11], 92)
@settings(max_examples=200, deadline=None)
def test_mixing_is_exact_to_one_sample_for_every_beginning(weight, count):
    drawn, following = mixing.drawn(count, weight), mixing.drawn(count + 1, weight)
    assert sum(drawn) == count and sorted(b - a for a, b in zip(drawn, following, strict=True)) == [0] * (len(weight) - 1) + [1]
    for own, share in zip(drawn, weight, strict=True):
        assert abs(own * sum(weight) - count * share) < sum(weight)


@pytest.mark.parametrize(
    "weight", [[1, 1, 1, 11], [1000, 700, 350, 100, 9], [1, 1, 1, 1, 1, 1, 1000], [3, 1, 4, 1, 5, 9, 2, 6]]
)
def test_every_sample_of_a_period_comes_from_one_source(weight):
    counts = np.array([mixing.drawn(count, weight) for count in range(2 * sum(weight) + 1)])
    steps = np.diff(counts, axis=0)
    assert (steps.sum(1) == 1).all() and steps.min() == 0 and (counts[sum(weight)] == weight).all()
    off = np.abs(counts * sum(weight) - np.arange(len(counts))[:, None] * np.array(weight))
    k = len(weight)
    if k > 4:
        assert (off * (2 * k - 2) <= sum(weight) * (2 * k - 3)).all()  # Tijdeman's bound, which is optimal
    assert (off < sum(weight)).all()


@given(st.lists(st.integers(10**3, 10**12), min_size=5, max_size=12), st.integers(0, 10**13))
@example([mixing.LONGEST_PERIOD, 1, 1, 1, 1, 1], 10**13)
@settings(max_examples=200, deadline=None)
def test_a_period_too_long_to_walk_is_exact_to_two_samples(weight, count):
    weight = [*weight, mixing.LONGEST_PERIOD]
    drawn, following = mixing.drawn(count, weight), mixing.drawn(count + 1, weight)
    assert sum(drawn) == count and sorted(b - a for a, b in zip(drawn, following, strict=True)) == [0] * (len(weight) - 1) + [1]
    for own, share in zip(drawn, weight, strict=True):
        assert 10 * abs(own * sum(weight) - count * share) < 17 * sum(weight)


def test_fractions_are_meant_in_decimal():
    assert mixing.weights([0.1, 0.2, 0.7]) == [1, 2, 7] and mixing.weights([3.0, 1.5]) == [2, 1]


def stream(**options):
    sources = (source("numbers:50", fraction=0.7), source("numbers:31", fraction=0.2), source("numbers:11", fraction=0.1))
    return DataConfig(sources=sources, mixing="stream", skip_budget=0.5, **options)


def test_a_stream_is_the_same_for_any_ranks_and_counts_are_exact():
    loader = Loader(stream(), image_size=8, batch_size=24)
    whole = [loader.batch(step) for step in range(20)]
    for world in (2, 3, 8):
        for batch in whole[:6]:
            parts = [Loader(stream(), image_size=8, batch_size=24, rank=r, world=world).batch(batch.step) for r in range(world)]
            assert {len(part.keys) for part in parts} == {24 // world}
            assert sorted(np.concatenate([part.index for part in parts]).tolist()) == sorted(batch.index.tolist())
            assert all((part.planned == batch.planned).all() for part in parts)
    for count, share in zip(whole[-1].cursors, (0.7, 0.2, 0.1), strict=True):
        assert abs(count - 480 * share) <= 1
    offsets, n = (0, 50, 81), (50, 31, 11)
    planned = np.concatenate([batch.planned for batch in whole])
    for offset, size in zip(offsets, n, strict=True):
        own = planned[(planned >= offset) & (planned < offset + size)] - offset
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


@pytest.mark.parametrize(
    ("change", "words"),
    [(dict(views=2), "sources with one view"), (dict(paired=False), "all have text or none")],
)
def test_what_a_stream_can_not_be(change, words):
    config = DataConfig(sources=(source(), source(**change)), mixing="stream")
    with pytest.raises(ValueError, match=words):
        Loader(config, image_size=8, batch_size=8)
    with pytest.raises(ValueError, match="8 images can't be shared evenly by 3 ranks"):
        Loader(stream(), image_size=8, batch_size=8, world=3)


@pytest.mark.filterwarnings("ignore::ov3fast.data.SkipWarning")
def test_threads_and_a_fork_change_nothing(make_shards):
    shards = SourceConfig(str(make_shards(30)))
    options = dict(image_size=8, batch_size=8)
    expected = list(Loader(DataConfig(sources=(shards,)), **options).batches(stop=6))
    loader = Loader(DataConfig(sources=(shards,), threads=3, workers=1), **options)
    loader.batch(0)  # starts threads in this process; the forked worker has to start its own
    for a, b in zip(expected, loader.batches(stop=6), strict=True):
        assert a.keys == b.keys and torch.equal(a.images, b.images) and a.text == b.text


def test_every_id_once_per_epoch_while_world_and_workers_change():
    """W = 2 -> 1 -> 3 in the middle of an epoch, with different numbers of workers: each sample comes once."""
    config = DataConfig(sources=(source("numbers:120"),), skip_budget=0.5)
    whole = Loader(config, image_size=8, batch_size=12)
    seen = []
    for world, workers, steps in ((2, 0, range(0, 3)), (1, 1, range(3, 7)), (3, 0, range(7, 10))):
        for step in steps:
            for rank in range(world):
                own = DataConfig(sources=config.sources, skip_budget=0.5, workers=workers)
                loader = Loader(own, image_size=8, batch_size=12, rank=rank, world=world)
                (batch,) = loader.batches(step, step + 1)
                assert (batch.planned == whole.batch(step).planned).all()
                seen += batch.keys
    assert len(seen) == 120 and len(set(seen) | {"13"}) == 120  # 13 is broken and replaced by another


def test_at_the_internets_scale():
    """1.2 billion samples in 10^5 shards over 1,024 ranks: order, cursor, once per epoch and ratios, by counting."""
    sources = (source("internet", fraction=0.9), source("numbers:1000003", fraction=0.1))
    loader = Loader(
        DataConfig(sources=sources, mixing="stream", shard_window=64, skip_budget=0.5),
        image_size=8,
        batch_size=8192,
        world=1024,
    )
    order, lengths = loader.orders[0], np.array(loader.sources[0].dataset.lengths)
    assert order.n == lengths.sum() > 1_190_000_000

    # Once per epoch: the blocks partition the epoch, each shard is in one block, and a block has each sample of its shards once.
    for epoch in (0, 3):
        shards, starts, edges = order._order_of_shards(epoch)
        assert (np.bincount(shards, minlength=len(lengths)) == 1).all() and edges[-1] == order.n and (np.diff(edges) > 0).all()
        for block in (0, 777, len(edges) - 2):
            positions = epoch * order.n + np.arange(edges[block], edges[block + 1])
            samples = order[positions]
            inside = shards[64 * block : 64 * block + 64]
            expected = np.concatenate([np.arange(order._first[shard], order._first[shard + 1]) for shard in np.sort(inside)])
            assert (np.sort(samples) == expected).all()

    # The cursor: step 10^6 is reached as fast as step 0, and the ranks of any world size together have the batch.
    for step in (0, 10**6):
        batch = loader.batch(step)
        assert len(batch.keys) == 8 and len(batch.planned) == 8192
        held = 0
        for world in (1024, 512, 3 * 2**6 + 64):
            edges = [loader._drawn_before(step, rank, world) for rank in range(world + 1)]
            assert edges[0] == loader._drawn_before(step, 0, 1) and edges[-1] == loader._drawn_before(step + 1, 0, 1)
            shares = np.diff(np.array(edges, dtype=np.int64), axis=0)
            assert (shares >= 0).all() and set(shares.sum(1).tolist()) == {8192 // world}
            held += shares.sum()
        assert held == 3 * 8192

    # The ratios: within one sample after any number of steps.
    for step in (1, 1000, 10**6, 10**9):
        first, second = loader.cursors(step)
        assert first + second == 8192 * step and abs(10 * first - 9 * 8192 * step) <= 10
