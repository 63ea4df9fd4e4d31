"""Archives written by other programs: unsupported content is counted and reported, and the rest is read."""

import io
import json
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from ov3fast.data import (
    DataConfig,
    DataError,
    Loader,
    SampleError,
    ShardDataset,
    SkipWarning,
    SourceConfig,
    order_hash,
    summarise,
    write_index,
)
from ov3fast.data.shards import find_shards
from ov3fast.evaluation.pictures import read_pictures


def member(name, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path, members, kind=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=kind, errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, encode, first: int = 0) -> list[tuple[tarfile.TarInfo, bytes]]:
    """jpg and txt of each."""
    picture = encode(Image.new("RGB", (16, 16), (200, 10, 30)), "JPEG")
    return [
        part
        for i in range(first, first + count)
        for part in (member(f"{i}.jpg", picture), member(f"{i}.txt", f"words {i}".encode()))
    ]


def usable(dataset: ShardDataset) -> list[str]:
    keys = []
    for i in range(len(dataset)):
        try:
            keys.append(dataset[i].key)
        except SampleError:
            continue
    return keys


def loader(path, **options):
    config = DataConfig(sources=(SourceConfig(str(path), captions=(("txt", 1.0),)),), **options)
    return Loader(config, image_size=16, batch_size=2)


def left_out(dataset: ShardDataset) -> dict[str, int]:
    return dict(dataset.left_out.counts)


@pytest.mark.parametrize("indexed", [False, True])
def test_training_and_evaluation_notice_a_cut_at_the_start(tmp_path, png, indexed):
    path = write_tar(tmp_path / "0.tar", samples(100, png))
    if indexed:
        write_index(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(SkipWarning, match=r"1 truncated_tar \(.*0\.tar ends after \d\d whole samples"):
        data = loader(tmp_path, skip_budget=1.0)
    with pytest.warns(SkipWarning, match=r"1 truncated_tar \(.*0\.tar ends after"):
        pictures = read_pictures(tmp_path, 16, skip_budget=1.0)
    assert 45 < len(pictures) < 55
    if indexed:
        assert pictures.skipped == {"truncated_tar": 100 - len(pictures)} and len(data.store.sources[0].dataset) == 100
    else:
        assert data.skips.counts == pictures.skipped == {"truncated_tar": 1}
        assert len(data.batch(0).keys) == 2  # samples that no index counts are outside the budget
        assert "truncated_tar" in str(summarise(tmp_path))
    assert not summarise(tmp_path).complete


def test_an_index_of_a_cut_tar_does_not_hide_the_cut(tmp_path, png):
    path = write_tar(tmp_path / "0.tar", samples(10, png))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.warns(SkipWarning, match="truncated_tar"):
        write_index(tmp_path)
    with pytest.warns(SkipWarning, match="truncated_tar"):
        assert loader(tmp_path, skip_budget=1.0).skips.counts == {"truncated_tar": 1}


def test_files_that_systems_leave_are_dropped_and_counted(tmp_path, png):
    fork = b"\0\5\26\7\0\2\0\0Mac OS X" + bytes(60)
    members = []
    for info, data in samples(12, png):
        members += [member(f"._{info.name}", fork), (info, data)]
    members += [member(".DS_Store", b"x"), member("__MACOSX/3.jpg", b"x"), member("a/Thumbs.db", b"x")]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "._0.tar").write_bytes(fork)
    with pytest.warns(SkipWarning, match=r"1 foreign_archive \(.*/\._0\.tar\); 27 foreign_member \(.*0\.tar: \._0\.jpg\)"):
        dataset = ShardDataset(tmp_path)
    assert usable(dataset) == [str(i) for i in range(12)] and left_out(dataset) == {"foreign_member": 27, "foreign_archive": 1}
    with pytest.warns(SkipWarning):
        write_index(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["shardlist"][0]["nsamples"] == 12
    assert summarise(tmp_path).complete


@pytest.mark.parametrize(
    "content, reason",
    [(b"", "empty_file"), (b"no tar at all" * 99, "no_tar"), (b"\x1f\x8b\x08" + bytes(99), "compressed_tar")],
)
def test_one_unusable_archive_does_not_stop_the_others(tmp_path, png, content, reason):
    write_tar(tmp_path / "0.tar", samples(3, png))
    (tmp_path / "1.tar").write_bytes(content)
    with pytest.warns(SkipWarning, match=rf"1 {reason} \(.*1\.tar"):
        dataset = ShardDataset(tmp_path)
    assert usable(dataset) == ["0", "1", "2"]
    with pytest.raises(DataError, match=f"holds no whole sample.*{reason}"):
        ShardDataset(tmp_path / "1.tar")


def test_archives_that_are_passed_over_are_named(tmp_path, png):
    write_tar(tmp_path / "0.tar", samples(3, png))
    write_index(tmp_path)
    write_tar(tmp_path / "1.tar", samples(3, png))
    (tmp_path / "2.tar.gz").touch()
    (tmp_path / "3.tar").mkdir()
    with pytest.warns(
        SkipWarning, match=r"1 compressed_tar .*; 1 folder_named_tar .*; 1 not_in_index \(.*1\.tar; write the index"
    ):
        assert len(ShardDataset(tmp_path)) == 3


def test_members_of_a_sample_need_not_be_neighbours(tmp_path, png):
    members = samples(5, png)
    write_tar(tmp_path / "0.tar", sorted(members, key=lambda part: part[0].name.rpartition(".")[2]))
    dataset = ShardDataset(tmp_path)
    assert usable(dataset) == list("01234") and dataset[3].captions == {"txt": "words 3"}
    assert not dataset.left_out
    # An index by neighbours, as webdataset counts, lists twice as many.
    index = {"shardlist": [{"url": "0.tar", "nsamples": 10, "filesize": (tmp_path / "0.tar").stat().st_size}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    dataset = ShardDataset(tmp_path)
    assert usable(dataset) == list("01234")
    with pytest.raises(
        SampleError, match=r"unsorted_tar .*lists more samples than the 5 of .*; sort the tar, or run write_index"
    ):
        dataset[7]


def test_samples_that_the_index_does_not_count_are_named(tmp_path, png):
    write_tar(tmp_path / "0.tar", samples(5, png))
    size = (tmp_path / "0.tar").stat().st_size
    for filesize, when in ((size - 1, "at the start"), (size, "when it is opened")):
        index = {"shardlist": [{"url": "0.tar", "nsamples": 2, "filesize": filesize}]}
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.warns(SkipWarning, match="index"):
            dataset = ShardDataset(tmp_path)
            dataset[0]
        assert left_out(dataset) == {"not_in_index": 3}, when


def test_links_lead_to_the_file_they_name(tmp_path, png):
    members = samples(1, png)
    members += [
        member("1.jpg", type=tarfile.LNKTYPE, linkname="0.jpg"), member("1.txt", b"one"),
        member("a/2.jpg", type=tarfile.SYMTYPE, linkname="../0.jpg"), member("a/2.txt", type=tarfile.LNKTYPE, linkname="1.txt"),
        member("3.jpg", type=tarfile.LNKTYPE, linkname="missing.jpg"), member("3.txt", b"three"),
        member("4.fifo", type=tarfile.FIFOTYPE), member("folder", type=tarfile.DIRTYPE),
    ]  # fmt: skip
    with pytest.warns(SkipWarning, match=r"1 broken_link \(.*: 3\.jpg -> missing\.jpg\); 1 special_member \(.*4\.fifo"):
        dataset = ShardDataset(write_tar(tmp_path / "0.tar", members))
    assert usable(dataset) == ["0", "1", "a/2"] and dataset[2].captions == {"txt": "one"}
    with pytest.raises(SampleError, match="missing_image"):
        dataset[3]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_any_bytes(tmp_path, png, kind):
    latin, newline = b"caf\xe9".decode("utf-8", "surrogateescape"), "line\nbreak"
    [(_, picture), (_, words)] = samples(1, png)
    keys = [latin, newline, "snow ☃", "x" * 80 if kind == tarfile.USTAR_FORMAT else "long" * 60]
    members = [member(f"{key}.{suffix}", data) for key in keys for suffix, data in (("jpg", picture), ("txt", words))]
    write_tar(tmp_path / "0.tar", members, kind)
    dataset = ShardDataset(tmp_path)
    assert usable(dataset) == keys and not dataset.left_out
    assert "\n" not in str(summarise(tmp_path, caption_keys=["x"])).split("missing_caption: line")[1].splitlines()[0]
    str(summarise(tmp_path, caption_keys=["x"])).encode()
    assert "".join(read_pictures(tmp_path, 8).keys).encode()  # for the report
    batch = loader(tmp_path).batch(0)
    assert len(order_hash("", keys)) == 64 and set(batch.keys) <= set(keys)


def test_pax_records_are_understood_or_counted(tmp_path, png):
    members = samples(2, png)
    members[0][0].pax_headers = {"comment": "a\nb", "mtime": "1.5", "path": "5.jpg", "size": str(members[0][0].size)}
    members[1][0].pax_headers = {"path": "5.txt"}
    path = write_tar(tmp_path / "0.tar", members, tarfile.PAX_FORMAT)
    assert usable(ShardDataset(path)) == ["5", "1"]
    data = path.read_bytes()
    at = data.index(b"path=5.txt")
    path.write_bytes(data[: at - 3] + b"zz " + data[at:])
    with pytest.warns(SkipWarning, match="1 broken_pax_header"):
        dataset = ShardDataset(path)
    assert usable(dataset) == ["5", "1"] and len(dataset) == 3  # the words lie under the name in their own header
    assert dataset.text(1).captions == {"txt": "words 0"}


def test_duplicates_and_names_without_a_key_are_counted(tmp_path, png):
    members = [*samples(2, png), member("0.txt", b"again"), member("README", b"x"), member("a/.hidden", b"x")]
    with pytest.warns(SkipWarning, match=r"1 duplicate_member \(.*0\.txt\); 2 name_without_suffix \(.*README\)"):
        dataset = ShardDataset(write_tar(tmp_path / "0.tar", members))
    assert usable(dataset) == ["0", "1"] and dataset[0].captions == {"txt": "again"}


def test_archives_appended_to_each_other_are_read_on(tmp_path, png):
    one = write_tar(tmp_path / "0.tar", samples(2, png)).read_bytes()
    two = write_tar(tmp_path / "1.tar", samples(2, png, first=2)).read_bytes()
    (tmp_path / "1.tar").unlink()
    (tmp_path / "0.tar").write_bytes(one + two)
    assert usable(ShardDataset(tmp_path)) == ["0", "1", "2", "3"]
    (tmp_path / "0.tar").write_bytes(one + b"garbage")
    with pytest.warns(SkipWarning, match=r"1 trailing_data \(.*7 bytes\)"):
        assert usable(ShardDataset(tmp_path)) == ["0", "1"]


def test_a_damaged_header_is_a_cut(tmp_path, png):
    path = write_tar(tmp_path / "0.tar", samples(4, png))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmember("2.jpg").offset
    data[at + 3] ^= 1
    path.write_bytes(data)
    with pytest.warns(SkipWarning, match="truncated_tar .* ends after 2 whole samples"):
        assert usable(ShardDataset(path)) == ["0", "1"]


def test_a_cut_loses_the_sample_it_went_through_even_where_files_are_no_neighbours(tmp_path, png):
    members = samples(4, png)
    members = [*members[::2], *members[1::2]]
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmember("1.txt").offset_data + 2])
    with pytest.warns(SkipWarning):
        data = loader(path, skip_budget=1.0)
        list(data.batches(stop=3))
    assert data.skips.counts["truncated_tar"] == 1 and data.skips.counts["missing_caption"] == 2
    assert [sample for sample in usable(data.store.sources[0].dataset)] == ["0", "2", "3"]


def test_brace_patterns(tmp_path, png):
    for i in range(4):
        write_tar(tmp_path / f"{i:05d}.tar", samples(2, png, first=2 * i))
    assert [s.path.name for s in find_shards(tmp_path / "{00001..00003}.tar")] == ["00001.tar", "00002.tar", "00003.tar"]
    assert len(ShardDataset(f"{tmp_path}/{{00000,00002}}.tar")) == 4
    assert [s.path.name for s in find_shards(f"{tmp_path}/{{00000..00003..2}}.tar")] == ["00000.tar", "00002.tar"]
    assert [s.path.name for s in find_shards(f"{tmp_path}/{{00000,{{00001,00002}}}}.tar")] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    assert len(find_shards(f"{tmp_path.parent}/**/{tmp_path.name}/**/*.tar")) == len(list(tmp_path.rglob("*.tar")))
    with pytest.raises(FileNotFoundError, match=r"00004\.tar"):
        find_shards(f"{tmp_path}/{{00003..00005}}.tar")
    literal = tmp_path / "{a,b}"
    literal.mkdir()
    write_tar(literal / "0.tar", samples(2, png))
    assert len(ShardDataset(literal)) == 2


def test_home_folder(tmp_path, png, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "0.tar", samples(2, png))
    assert len(ShardDataset("~/0.tar")) == 2 and len(ShardDataset("~/*.tar")) == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"shardlist": [{"url": "0.tar"}]}', '{"shardlist": [{"url": "0.tar", "nsamples": "x"}]}']
)
def test_a_broken_index_or_sidecar_is_named(tmp_path, png, text):
    write_tar(tmp_path / "0.tar", samples(2, png))
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(
        DataError, match=r"the index .*index\.json can't be read .*; write it again with write_index, or delete it"
    ):
        ShardDataset(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "0.captions.json").write_text("[]")
    with pytest.raises(DataError, match=r"0\.captions\.json can't be read"):
        ShardDataset(tmp_path)


def test_files_and_shards_show_the_same_image(tmp_path, png):
    """EXIF and 16-bit images in training, evaluation and `encode`."""
    from ov3fast.data.preprocess import read_image

    exif = Image.Exif()
    exif[274] = 6
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))
    deep = Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32))
    files = {"jpg": png(wide, "JPEG", exif=exif), "png": png(deep)}
    for suffix, data in files.items():
        (tmp_path / f"a.{suffix}").write_bytes(data)
        write_tar(tmp_path / "0.tar", [member(f"a.{suffix}", data), member("a.txt", b"words")])
        image = ShardDataset(tmp_path / "0.tar")[0].image
        file = read_image(tmp_path / f"a.{suffix}")
        assert image.size == ((32, 64) if suffix == "jpg" else (32, 32))
        assert np.array_equal(np.asarray(image), np.asarray(file.convert("RGB")))
    assert len(np.unique(np.asarray(image))) == 256


def test_warnings_come_once_for_a_set(tmp_path, png):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [*samples(2, png, 2 * i), member("._x.jpg", b"x")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ShardDataset(tmp_path)
    assert len(caught) == 1 and "3 foreign_member" in str(caught[0].message)
