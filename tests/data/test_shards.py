import io
import json
import pickle
import tarfile

import pytest

from ov3fast.data import DataError, SampleError, ShardDataset, summarise, write_index, write_shards
from ov3fast.data.shards import find_shards


def test_samples_come_back_as_written(make_shards):
    dataset = ShardDataset(make_shards(20, per_shard=8))
    assert len(dataset) == 20 and dataset.lengths == [8, 8, 4]
    for i in (0, 7, 8, 19):
        sample = dataset[i]
        assert sample.key == f"{i:05d}" and sample.image.mode == "RGB" and sample.image.size == (24, 16)
        assert sample.image.getpixel((3, 3)) == (i, 2 * i, 3 * i)
        assert sample.captions == {"name": f"name {i}", "caption": f"caption {i}"}
        assert sample.meta == {"concept": f"c{i}", "style": "s0"}
        assert dataset.text(i) == sample._replace(image=None)
    with pytest.raises(IndexError):
        dataset[20]


def test_the_index_is_one_that_wids_reads(make_shards, tmp_path):
    import wids

    folder = make_shards(20, per_shard=8)
    theirs = wids.ShardListDataset(str(folder / "index.json"), cache_dir=str(tmp_path / "cache"), transformations=[])
    assert len(theirs) == 20
    assert theirs[13]["__key__"] == "00013" and json.loads(theirs[13][".json"].read())["captions"]["name"] == "name 13"


def test_writing_is_all_or_nothing(tmp_path, files):
    write_shards([("a", files(0))], tmp_path / "set")

    def broken():
        yield "b", files(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path / "set")
    assert ShardDataset(tmp_path / "set")[0].key == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    with pytest.raises(ValueError, match="two have the key 'a'"):
        write_shards([("a", files(0)), ("b", files(1)), ("a", files(2))], tmp_path / "set")


def test_an_earlier_set_is_replaced_and_foreign_files_are_not(tmp_path, files):
    samples = [(str(i), files(i)) for i in range(4)]
    write_shards(samples, tmp_path / "set", samples_per_shard=1)
    (tmp_path / "set/00003.captions.json").write_text("{}")
    write_shards(samples[:1], tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["00000.tar", "index.json"]
    (tmp_path / "set/notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_shards(samples, tmp_path / "set")
    assert len(ShardDataset(tmp_path / "set")) == 1 and (tmp_path / "set/notes.txt").exists()


def test_equal_samples_give_equal_bytes(tmp_path, files):
    for name in ("one", "two"):
        write_shards([("a", files(0)), ("b", files(1))], tmp_path / name)
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()


def test_img2dataset_layout(tmp_path, png):
    """key.jpg, key.txt, key.json with caption, url, sha256 and sizes; read as folder, file, list and pattern."""
    from PIL import Image

    from ov3fast.data.skips import Skip

    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i in range(3):
            record = {"caption": f"words {i}", "url": "u", "key": f"{i:09d}", "sha256": "f" * 64, "width": 8, "error": None}
            for suffix, data in (
                ("jpg", png(Image.new("RGB", (8, 8)), "JPEG")),
                ("json", json.dumps(record).encode()),
                ("txt", f" text {i}\n".encode()),
            ):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for shards in (tmp_path, tmp_path / "00000.tar", [tmp_path / "00000.tar"], str(tmp_path / "*.tar")):
        dataset = ShardDataset(shards)
        assert len(dataset) == 3
        sample = dataset[1]
        assert sample.key == "000000001" and sample.captions["txt"] == "text 1" and sample.captions["caption"] == "words 1"
        assert sample.meta["sha256"] == "f" * 64 and sample.meta["width"] == 8
    assert not dataset.truncated()
    write_index(tmp_path)
    assert ShardDataset(tmp_path).lengths == [3]
    summary = summarise(tmp_path, caption_keys=["re_caption"])
    assert summary.reasons == {"missing_caption": 3} and isinstance(summary.skips[0], Skip)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, kind):
    folder = "folder_" * 13 + "/" + "sub.dir_" * 9
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for i in range(2):
            info = tarfile.TarInfo(f"{folder}/key{i}.txt")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"words"))
    dataset = ShardDataset(tmp_path / "a.tar")
    assert [dataset.text(i).key for i in range(2)] == [f"{folder}/key{i}" for i in range(2)]
    assert dataset.text(1).captions == {"txt": "words"}


def test_a_tar_cut_anywhere_keeps_the_samples_before_the_cut(make_shards):
    folder = make_shards(6, per_shard=6)
    path = folder / "00000.tar"
    whole = path.read_bytes()
    reference = ShardDataset(folder)
    expected = [(reference[i].key, reference[i].image.tobytes()) for i in range(6)]
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith(".png")]
    for cut in [*range(512, ends[-1], 311), *(end - 1 for end in ends), *ends]:
        path.write_bytes(whole[:cut])
        dataset = ShardDataset(folder)
        readable = 0
        for i in range(6):
            try:
                sample = dataset[i]
            except SampleError as error:
                assert error.skip.reason in ("truncated_tar", "missing_image")
            else:
                assert (sample.key, sample.image.tobytes()) == expected[i]
                readable += 1
        assert readable == sum(end <= cut for end in ends)
        assert dataset.truncated()[path] >= 1


def test_without_an_index_a_cut_tar_has_the_samples_that_are_left(make_shards):
    folder = make_shards(6, per_shard=6)
    path = folder / "00000.tar"
    (folder / "index.json").unlink()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    dataset = ShardDataset(folder)
    assert 0 < len(dataset) < 6 and dataset.truncated() == {path: 1}
    assert all(dataset[i].key == f"{i:05d}" for i in range(len(dataset)))


def test_a_dataset_travels_to_another_process(make_shards):
    dataset = ShardDataset(make_shards(10, per_shard=4))
    dataset[0]
    assert pickle.loads(pickle.dumps(dataset))[9].key == "00009"


def test_more_shards_than_are_kept_open(make_shards, monkeypatch):
    monkeypatch.setattr("ov3fast.data.shards.MAX_OPEN_SHARDS", 2)
    dataset = ShardDataset(make_shards(10, per_shard=2))
    assert [dataset[i].key for i in (9, 0, 5, 2, 7, 9, 1)] == [f"{i:05d}" for i in (9, 0, 5, 2, 7, 9, 1)]
    assert len(dataset._open) == 2


def test_broken_json_and_missing_image_are_named(make_shards, files):
    no_image, bad_json, list_json = files(1), files(2), files(3)
    del no_image["png"]
    bad_json["json"], list_json["json"] = b'{"captions": {', b"[1]"
    dataset = ShardDataset(make_shards(4, replace={1: no_image, 2: bad_json, 3: list_json}))
    for i, reason in ((1, "missing_image"), (2, "broken_json"), (3, "broken_json")):
        with pytest.raises(SampleError) as error:
            dataset[i]
        assert error.value.skip.reason == reason and error.value.skip.key == f"{i:05d}"


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda path: None, "there is no file or folder"),
        (lambda path: path.mkdir(), r"holds no \.tar file \(it holds nothing\)"),
        (lambda path: (path.mkdir(), (path / "a.jpg").touch()), r"holds no \.tar file \(it holds a\.jpg\)"),
        (lambda path: (path.mkdir(), (path / "a.tar").touch()), "holds no whole sample"),
        (lambda path: path.write_bytes(b"no tar at all" * 100), "it is not a tar file, or was truncated at its start"),
        (lambda path: (path.mkdir(), (path / "index.json").write_text('{"shardlist": []}')), "lists no shard"),
        (
            lambda path: (path.mkdir(), (path / "index.json").write_text('{"shardlist": [{"url": "x.tar", "nsamples": 1}]}')),
            r"lists x\.tar, which does not exist",
        ),
    ],
)
def test_a_wrong_folder_is_one_clear_line(tmp_path, prepare, message):
    path = tmp_path / "data"
    prepare(path)
    with pytest.raises((FileNotFoundError, DataError), match=message) as error:
        ShardDataset(path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_shards_and_no_match(tmp_path):
    with pytest.raises(DataError, match="empty list"):
        find_shards([])
    with pytest.raises(DataError, match="no file matches"):
        find_shards(str(tmp_path / "*.tar"))


def test_summary_counts_what_is_there_and_what_is_not(make_shards, files):
    truncated, empty = files(2), files(5)
    truncated["png"] = truncated["png"][:-30]
    empty["json"] = b"{}"
    folder = make_shards(20, per_shard=8, replace={2: truncated, 5: empty})
    last = folder / "00002.tar"
    last.write_bytes(last.read_bytes()[:2600])
    summary = summarise(folder, workers=2)
    assert (summary.samples, summary.readable) == (20, 15)
    assert summary.reasons == {"truncated_image": 1, "missing_caption": 1, "truncated_tar": 3}
    assert [s.truncated for s in summary.shards] == [False, False, True]
    assert [s.readable for s in summary.shards] == [6, 8, 1]
    assert summary.captions == {"name": 15, "caption": 15} and summary.smallest == summary.largest == (24, 16)
    assert summarise(folder, workers=1) == summary and summary.skipped == 5
    text = str(summary)
    assert text.startswith(
        "15 of 20 samples can be used, in 3 shards\n  pictures: 24x16 to 24x16\n  captions: 15 caption, 15 name\n"
    )
    assert "00002.tar: 1 of 4, cut short: 3 truncated_tar" in text and "truncated_image: 00002 (" in text
