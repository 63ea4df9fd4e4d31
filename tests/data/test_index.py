"""A tar's index agrees with a scan of the tar."""

import io
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ov3fast.cli import main
from ov3fast.data import SampleStore, ShardDataset, index_shards, tar_index
from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.data.indexed_tar import OpenShard
from ov3fast.data.shards import INDEX


def walked(path):
    shard = OpenShard(path, use_index=False)
    return (
        [(key, {s: (m.start, m.size) for s, m in files.items()}) for key, files in shard.samples],
        shard.cut,
        shard.lost,
        str(shard.left_out),
    )


def by_index(path):
    shard = OpenShard(path)
    assert not isinstance(shard.samples, list), "it was looked through"
    return (
        [(key, {s: (m.start, m.size) for s, m in files.items()}) for key, files in shard.samples],
        shard.cut,
        shard.lost,
        str(shard.left_out),
    )


def test_it_says_what_the_tar_says(make_shards):
    folder = make_shards(20)
    expected = [walked(folder / f"0000{i}.tar") for i in range(3)]
    samples = [ShardDataset(folder)[i] for i in range(20)]
    (folder / INDEX).unlink()
    assert [(s.path.name, s.samples) for s in index_shards(folder, workers=1)] == [
        ("00000.tar", 8),
        ("00001.tar", 8),
        ("00002.tar", 4),
    ]
    assert [by_index(folder / f"0000{i}.tar") for i in range(3)] == expected
    again = ShardDataset(folder)
    for i, sample in enumerate(samples):
        assert (again[i].key, again[i].captions, again[i].meta) == (sample.key, sample.captions, sample.meta)
        assert again[i].image.tobytes() == sample.image.tobytes()
    assert again.keys([0, 19]) == ["00000", "00019"]


@given(st.lists(st.tuples(st.text("abä/.", min_size=1, max_size=6), st.binary(max_size=700)), max_size=8), st.integers(0, 3000))
@settings(max_examples=30, deadline=None)
def test_any_tar_and_any_cut(tmp_path_factory, files, cut):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(path.read_bytes()[: max(512, path.stat().st_size - cut)])
    shard = OpenShard(path)
    tar_index.write(path, tar_index.pack(shard, shard.size, shard.head()))
    assert by_index(path) == walked(path)


def test_the_index_of_another_tar_or_a_damaged_one_does_not_count(make_shards):
    folder = make_shards(8)
    index_shards(folder, workers=1)
    tar, index = folder / "00000.tar", folder / "00000.index"
    content, expected = tar.read_bytes(), walked(tar)
    for damaged in (b"", index.read_bytes()[:40], index.read_bytes()[:-3], b"x" * 100):
        index.write_bytes(damaged)
        assert isinstance(OpenShard(tar).samples, list) and walked(tar) == expected
    index_shards(folder, workers=1)
    assert by_index(tar) == expected
    tar.write_bytes(content + bytes(512))
    assert isinstance(OpenShard(tar).samples, list)


def test_a_start_looks_into_no_tar_and_a_sample_costs_its_own_bytes(make_shards, monkeypatch):
    folder = make_shards(40, per_shard=20)
    index_shards(folder, workers=1)
    monkeypatch.setattr("ov3fast.data.indexed_tar.read_contents", lambda data: pytest.fail("a tar was looked through"))
    dataset = ShardDataset(folder)
    assert len(dataset) == 40 and dataset[39].key == "00039"


def test_the_command_and_several_processes(make_shards, capsys):
    folder = make_shards(20)
    assert main(["data", "index", str(folder), "--workers", "2"]) == 0
    assert capsys.readouterr().out == "20 samples in 3 shards indexed\n"
    before = (folder / "00000.index").stat().st_mtime_ns
    assert main(["data", "index", str(folder / "00000.tar"), "--workers", "1"]) == 0
    assert (folder / "00000.index").stat().st_mtime_ns == before
    assert main(["data", "index", str(folder), "--again", "--workers", "1"]) == 0
    assert (folder / "00000.index").stat().st_mtime_ns > before
    assert main(["data", "index", str(folder / "nothing")]) == 2


def test_what_is_broken_is_named(make_shards):
    folder = make_shards(20)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:5000])
    (folder / "00002.tar").write_bytes(b"no tar")
    with pytest.warns(match="1 no_tar .*1 truncated_tar"):
        found = index_shards(folder, workers=1)
    assert [shard.truncated for shard in found] == [False, True]
    with pytest.warns(match="no_tar|truncated_tar"):
        assert len(ShardDataset(folder)) == sum(shard.samples for shard in found)


def test_shards_are_written_anew_over_indexed_ones(make_shards):
    folder = make_shards(8)
    index_shards(folder, workers=1)
    assert len(ShardDataset(make_shards(5))) == 5
    assert not (folder / "00000.index").exists()


@pytest.mark.full
def test_a_hundred_thousand_indexed_shards_start_in_seconds(make_shards, tmp_path):
    """They are hard links to one tar, so that only the number of names matters."""
    import json
    import os

    count, folder = 100_000, tmp_path / "many"
    source = make_shards(2)
    index_shards(source, workers=1)
    folder.mkdir()
    size = (source / "00000.tar").stat().st_size
    for number in range(count):
        if number % 30_000 == 0:  # file systems limit the number of links to a file
            links = [tmp_path / f"copy-{number}.tar", tmp_path / f"copy-{number}.index"]
            for link, name in zip(links, ("00000.tar", "00000.index"), strict=True):
                link.write_bytes((source / name).read_bytes())
        for link in links:
            os.link(link, folder / f"{number:06d}{link.suffix}")
    entries = [{"url": f"{number:06d}.tar", "nsamples": 2, "filesize": size} for number in range(count)]
    (folder / INDEX).write_text(json.dumps({"shardlist": entries}))
    began = time.perf_counter()
    store = SampleStore(DataConfig(sources=(SourceConfig(str(folder)),), shard_window=64))
    seconds = time.perf_counter() - began
    assert store.n == 2 * count
    assert store.sample(2 * count - 1, decode=True)[1].key == "00001"
    print(f"start-up on {count} shards: {seconds:.1f} s")
    assert seconds < 60  # generous, for busy machines; benches/data.py measures it


def test_the_index_is_small():
    """9 bytes per file, 4 per sample, and the keys; checks the size for 1.2 billion samples."""
    from types import SimpleNamespace

    from ov3fast.data.skips import Tally
    from ov3fast.data.tar_members import Member

    files, offset, samples = (".jpg", ".txt", ".json"), 512, []
    for i in range(12_000):
        members = {}
        for suffix, size in zip(files, (90_000, 300, 900), strict=True):
            members[suffix] = Member("", offset, size)
            offset += 512 + -(-size // 512) * 512
        samples.append((f"{i:09d}", members))
    shard = SimpleNamespace(samples=samples, cut=None, lost=0, left_out=Tally())
    content = tar_index.pack(shard, offset, bytes(512))
    per_sample = len(content) / len(samples)
    assert per_sample < 40, per_sample
    lazily = tar_index.unpack(content, offset, bytes(512))[0]
    assert lazily[11_999][1][".json"].start == samples[-1][1][".json"].start and lazily.key(5) == "000000005"
    assert np.all([len(lazily[i][1]) == 3 for i in (0, 7)])
