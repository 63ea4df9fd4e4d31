"""Shards behind URLs, in fsspec's memory file system: the same samples, no excess bytes, transient failures retried and permanent ones reported."""

import threading

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ov3fast.data import DataConfig, DataError, Loader, ShardDataset, SourceConfig, index_shards, urls
from ov3fast.data.urls import LocalCache, Url


class Counting(MemoryFileSystem):
    """A memory:// file system that counts bytes and fails on demand."""

    protocol = "counting"
    store: dict = {}
    pseudo_dirs = [""]
    read, failures = [], []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://"))

    def cat_file(self, path, start=None, end=None, **options):
        if type(self).failures:
            failure = type(self).failures.pop()
            if isinstance(failure, Exception):
                raise failure
            return super().cat_file(path, start, end, **options)[:failure]
        content = super().cat_file(path, start, end, **options)
        type(self).read.append((path, len(content)))
        return content


fsspec.register_implementation("counting", Counting, clobber=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(urls, "FIRST_DELAY_S", 0.001)
    Counting.store.clear()
    Counting.read.clear()
    Counting.failures.clear()


@pytest.fixture
def remote(make_shards):
    """(local folder, URL of the same shards, indexed)."""
    folder = make_shards(40, per_shard=10)
    fs = fsspec.filesystem("counting")
    for path in folder.iterdir():
        if path.suffix == ".tar":
            fs.pipe_file(f"/shards/{path.name}", path.read_bytes())
    index_shards("counting://shards", workers=1)
    Counting.read.clear()
    return folder, "counting://shards"


def config(path, **options):
    return DataConfig(sources=(SourceConfig(str(path)),), **options)


def equal(a, b):
    import torch

    return a.keys == b.keys and a.captions == b.captions and torch.equal(a.images, b.images)


@pytest.mark.parametrize("options", [{}, {"threads": 4}, {"cache": True}, {"cache": True, "threads": 2, "read_ahead": 2}])
def test_the_same_batches_as_from_a_folder(remote, tmp_path, options):
    folder, url = remote
    if options.pop("cache", False):
        options |= {"cache_dir": str(tmp_path / "cache"), "cache_gib": 0.001}
    expected = list(Loader(config(folder), image_size=8, batch_size=8).batches(stop=7))
    got = list(Loader(config(url, **options), image_size=8, batch_size=8).batches(stop=7))
    assert all(map(equal, expected, got))


def test_a_sample_costs_its_own_bytes_wherever_it_lies(remote):
    _, url = remote
    costs = []
    for step in (1, 10**6):
        loader = Loader(config(url, shard_window=2), image_size=8, batch_size=1)
        loader.sources[0].dataset._open.clear()
        Counting.read.clear()
        loader.batch(step)
        costs.append(sum(size for path, size in Counting.read if path.endswith(".tar")))
        assert len([path for path, _ in Counting.read if path.endswith(".tar")]) == 2  # the first header, and the sample
    assert costs[0] == pytest.approx(costs[1], rel=0.1) and max(costs) < 4000


def test_each_form_of_a_url(remote):
    _, url = remote
    assert (
        len(ShardDataset(url)) == len(ShardDataset(f"{url}/index.json")) == len(ShardDataset(url + "/{00000..00003}.tar")) == 40
    )
    assert len(ShardDataset([f"{url}/00000.tar", f"{url}/00001.tar"])) == 20
    fs = fsspec.filesystem("counting")
    fs.rm_file("/shards/index.json")
    assert len(ShardDataset(url)) == 40
    fs.rm_file("/shards/00002.index")
    with pytest.raises(
        DataError, match="00002.tar has no index beside it; make one with `ov3fast data index counting://shards`"
    ):
        ShardDataset(url)
    with pytest.raises(DataError, match="patterns with \\* can't be listed at a URL"):
        ShardDataset(f"{url}/*.tar")
    with pytest.raises(DataError, match="nosuch://x/index.json can't be opened: Protocol not known"):
        ShardDataset("nosuch://x")


def test_joined_captions_are_found(remote):
    fs = fsspec.filesystem("counting")
    fs.pipe_file("/shards/00000.captions.json", b'{"00003": {"re_caption": "rewritten"}}')
    assert ShardDataset(remote[1])[3].captions["re_caption"] == "rewritten"


def test_failures_that_pass_are_not_seen(remote):
    folder, url = remote
    dataset = ShardDataset(url)
    Counting.failures[:] = [OSError("reset"), TimeoutError(), 7, 0]  # 7 and 0: only that many bytes arrive
    assert dataset[5].key == ShardDataset(folder)[5].key
    assert not Counting.failures


def test_failures_that_stay_are_named(remote):
    dataset = ShardDataset(remote[1])
    Counting.failures[:] = [OSError("reset")] * 50
    with pytest.raises(DataError, match=r"00000.tar|00000.index.* can't be read after 6 attempts: OSError: reset"):
        dataset[5]


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(tmp_path):
    fs = fsspec.filesystem("counting")
    for name in "abcd":
        fs.pipe_file(f"/{name}.tar", name.encode() * 400)
    cache = LocalCache(tmp_path, 1000 / 2**30)
    fetched = {name: cache.fetch(Url(f"counting://{name}.tar"), 400) for name in "ab"}
    import os

    os.utime(fetched["b"], (1, 1))
    third = cache.fetch(Url("counting://c.tar"), 400)
    assert fetched["a"].exists() and third.read_bytes() == b"c" * 400 and not fetched["b"].exists()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 1000
    Counting.read.clear()
    cache.fetch(Url("counting://c.tar"), 400)
    assert not Counting.read
    with pytest.raises(DataError, match="cache_gib: counting://a.tar has"):
        LocalCache(tmp_path, 100 / 2**30).fetch(Url("counting://a.tar"), 400)


def test_several_readers_fetch_a_tar_once(remote, tmp_path):
    dataset = ShardDataset(remote[1], cache=LocalCache(tmp_path, 1.0))
    others = [ShardDataset(remote[1], cache=LocalCache(tmp_path, 1.0)) for _ in range(2)]
    threads = [threading.Thread(target=d.text, args=(i,)) for d in (dataset, *others) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(path.endswith(".tar") for path, _ in Counting.read) == 1


def test_tars_are_read_ahead(remote, tmp_path):
    loader = Loader(config(remote[1], cache_dir=str(tmp_path), read_ahead=3, shard_window=1), image_size=8, batch_size=10)
    loader.batch(0)
    loader._fetchers._pool[1].shutdown()
    names = {path.name.partition("-")[2] for path in tmp_path.glob("*.tar")}
    wanted = {f"{int(loader.orders[0][[10 * step]][0]) // 10:05d}.tar" for step in (0, 3)}
    assert (
        wanted <= names <= wanted | {"00000.tar", "00001.tar"}
    )  # those of the first samples, whose captions are checked at startup


def test_a_cut_fetch_leaves_nothing(remote, tmp_path):
    cache = LocalCache(tmp_path, 1.0)
    Counting.failures[:] = [OSError("gone")] * 10
    with pytest.raises(DataError):
        cache.fetch(Url("counting://shards/00000.tar"), 100)
    assert not list(tmp_path.glob("*.tar"))
