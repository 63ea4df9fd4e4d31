import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ov3fast.data import (
    DataConfig,
    Loader,
    SampleError,
    ShardDataset,
    SkipWarning,
    SourceConfig,
    join_captions,
    summarise,
    write_shards,
)
from ov3fast.data.captions import check_choices, pick_caption


def test_captions_are_chosen_by_their_probabilities():
    captions, choices = {"a": "A", "b": "B", "c": "C"}, (("a", 0.6), ("b", 0.3), ("c", 0.1))
    chosen = [pick_caption(captions, choices, u) for u in (np.arange(1000) + 0.5) / 1000]
    assert [chosen.count(x) for x in "ABC"] == [600, 300, 100]


def test_missing_and_blank_captions_give_their_share_to_the_others():
    choices = (("a", 0.5), ("b", 0.25), ("c", 0.25), ("never", 0.0))
    chosen = [pick_caption({"a": "A", "b": " ", "c": "C", "never": "N"}, choices, u) for u in (np.arange(300) + 0.5) / 300]
    assert [chosen.count(x) for x in ("A", "C")] == [200, 100]
    assert pick_caption({"a": "A"}, choices, 1 - 1e-17) == "A"
    assert pick_caption({"x": "X", "never": "N"}, choices, 0.5) is None


@pytest.mark.parametrize("choices", [(), (("a", -1.0),), (("a", 0.0),)])
def test_impossible_choices_are_refused(choices):
    with pytest.raises(ValueError, match="captions: got"):
        check_choices(choices, "captions")


# ---- what counts as a caption --------------------------------------------------------------------------------------------


buffer = io.BytesIO()
Image.new("RGB", (8, 8)).save(buffer, "PNG")
PICTURE = buffer.getvalue()


def read(tmp_path, record, txt: bytes | None = None):
    """The sample of a shard whose JSON is this: an object, or text of JSON."""
    data = record.encode("utf-8", "surrogatepass") if isinstance(record, str) else json.dumps(record).encode()
    write_shards([("a", {"png": PICTURE, "json": data, **({} if txt is None else {"txt": txt})})], tmp_path / "shards")
    return ShardDataset(tmp_path / "shards").text(0)


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"caption": "ab"}, {"caption": "ab"}),
        ({"captions": {"name": "ab", "caption": ["cd", "ef"]}}, {"name": "ab", "caption": ("cd", "ef")}),
        ({"captions": ["ab", "cd"]}, {"captions": ("ab", "cd"), "caption": ("ab", "cd")}),
        ({"captions": ["ab", "cd"], "caption": "own"}, {"captions": ("ab", "cd"), "caption": "own"}),
        ({"captions": "ab"}, {"captions": "ab", "caption": "ab"}),
        ({"captions": {"name": [" ", None, 7, "ab"]}}, {"name": "ab"}),
        ({"caption": "ab", "url": "http://x", "key": "1", "sha256": "f", "status": "success"}, {"caption": "ab"}),
    ],
)
def test_text_and_lists_of_text_are_captions(tmp_path, record, expected):
    assert read(tmp_path, record).captions == expected


@pytest.mark.parametrize(
    "value, kind",
    [
        (None, "null"), (7, "no text but int"), (True, "no text but bool"), ([], "a list without text"), ([None, 3], "a list without text"),
        ({"en": "x"}, "no text but dict"), ("  ", "blank"), ("", "blank"), ("\0", "blank"), ("\u200b\ufeff", "blank"), ([" "], "a list without text"), ([["ab"]], "a list without text"),
    ],
)  # fmt: skip
def test_all_else_is_no_caption_and_is_named(tmp_path, value, kind):
    for record in ({"captions": {"name": value, "other": "x"}}, {"name": value, "other": "x"}):
        sample = read(tmp_path, record)
        assert sample.captions == {"other": "x"} and sample.refused == {"name": kind}
        folder = tmp_path / "shards"
        summary = summarise(folder, caption_keys=["name"])
        assert summary.reasons == {"missing_caption": 1} and f"name is {kind}" in str(summary)
        good, bad = ({"png": PICTURE, "json": json.dumps(r).encode()} for r in ({"name": "ab"}, record))
        write_shards([("good", good), ("bad", bad)], folder)
        config = DataConfig(sources=(SourceConfig(str(folder), captions=(("name", 1.0),)),), cache_images=True, skip_budget=0.5)
        with pytest.warns(SkipWarning, match=rf"bad: missing_caption \(none of name \({kind}\) among other\)"):
            data = Loader(config, image_size=8, batch_size=2)
        assert data.batch(0).text == ["ab", "ab"]


def test_a_null_caption_never_falls_to_the_url(tmp_path):
    from ov3fast.evaluation.pictures import read_pictures

    def texts(record, txt=None):
        read(tmp_path, record, txt)
        return read_pictures(tmp_path / "shards", 16).texts()

    plain = {"url": "http://x", "license": "CC", "caption": None}
    assert texts(plain) == [""]
    assert texts({**plain, "re_caption": "ab"}) == ["ab"]
    assert texts({**plain, "captions": {"de": "ein Hund"}}) == ["ein Hund"]
    assert texts({**plain, "captions": {"name": None}}, b"words") == ["words"]
    assert texts({**plain, "captions": ["ab", "cd"]}) == ["ab"]


def test_a_txt_beside_the_picture_is_its_own_caption_in_the_report(tmp_path):
    from ov3fast.evaluation.pictures import read_pictures

    for record, due in (({"url": "http://x"}, "words"), ({"caption": "ab"}, "ab"), ({"name": "cd"}, "words")):
        read(tmp_path, record, b"words")
        assert read_pictures(tmp_path / "shards", 16).own_captions() == [due]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"name": "hi \\ud83d"}', "hi \ufffd"), ('{"name": "\\ude00 hi"}', "\ufffd hi"), ('{"name": "\\ud83d\\ude00"}', "\U0001f600"),
        ('{"name": "\ud83d\ude00 é"}', "\U0001f600 é"), ('{"name": "\ude00\ud83d"}', "\ufffd\ufffd"),
    ],
)  # fmt: skip
def test_ill_formed_text_is_mended(tmp_path, text, expected):
    caption = read(tmp_path, text).captions["name"]
    assert caption == expected and caption.encode()


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"caf\xe9", "caf\ufffd"), ("\ufeffhi".encode(), "hi"), ("hi é".encode("utf-16"), "hi é"), (b" hi\n", "hi"),
        (b"\xed\xa0\xbd", "\ufffd\ufffd\ufffd"), (b"\xff\xfeh\0i", "h\ufffd"),
    ],
)  # fmt: skip
def test_text_files_of_any_bytes(tmp_path, data, expected):
    assert read(tmp_path, {}, data).captions == {"txt": expected}


def test_deep_or_wrong_json_is_named(tmp_path):
    for text in ("[" * 100_000, "7", "null", '{"a": ' * 50_000):
        with pytest.raises(SampleError, match="broken_json"):
            read(tmp_path, text)
    sample = read(tmp_path, {"meta": [1], "captions": {"name": "ab"}})
    assert sample.meta == {"meta": [1]} and sample.captions == {"name": "ab"}


def test_each_of_several_texts_is_picked(tmp_path):
    captions = {"a": ("A", "B"), "c": "C"}
    picked = [pick_caption(captions, (("a", 0.5), ("c", 0.5)), u) for u in (np.arange(400) + 0.5) / 400]
    assert [picked.count(x) for x in "ABC"] == [100, 100, 200]
    read(tmp_path, {"captions": ["ab", "cd"]})
    data = Loader(
        DataConfig(sources=(SourceConfig(str(tmp_path / "shards"), captions=(("captions", 1.0),), caption_key="captions"),)),
        image_size=8, batch_size=1,
    )  # fmt: skip
    batches = [data.batch(step) for step in range(40)]
    assert {batch.text[0] for batch in batches} == {batch.captions[0] for batch in batches} == {"ab", "cd"}


def test_the_custom_recipe_takes_lists_of_texts_for_captions(tmp_path):
    from ov3fast.recipes.custom import fit

    read(tmp_path, {"captions": {"caption": ["ab", "cd"]}})
    [source] = fit(str(tmp_path / "shards")).data.sources
    assert source.paired and source.captions == (("caption", 1.0),)


# ---- the join ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recap(tmp_path, files):
    """Two shards in img2dataset's manner and a parquet file with the columns of Recap-DataComp-1B."""
    samples = []
    for i in range(7):
        # samples 5 and 6 are the same picture, under two keys
        record = {"caption": f"alt {i}", "key": f"{i:09d}", "sha256": f"{min(i, 5):064x}"}
        samples.append((f"{i:09d}", {"png": files(i)["png"], "json": json.dumps(record).encode(), "txt": b"alt"}))
    write_shards(samples, tmp_path / "shards", samples_per_shard=4)
    rows = [9, 5, 3, 2, 0, 1]
    table = pa.table(
        {
            "url": ["u"] * 6,
            "key": [f"{i:09d}" for i in rows],
            "sha256": [f"{i:064x}" for i in rows],
            "re_caption": [f"recaption {i}" for i in rows],
            "org_caption": ["" if i == 2 else f"original {i}" for i in rows],
        }
    )
    pq.write_table(table, tmp_path / "recap.parquet", row_group_size=2)
    return tmp_path


@pytest.mark.parametrize("by, matched", [("sha256", 6), ("key", 5)])
def test_recaptions_join_by_hash_or_key(recap, by, matched):
    report = join_captions(recap / "shards", recap / "recap.parquet", by=by)
    assert report == (7, matched, 2)
    dataset = ShardDataset(recap / "shards")
    for i in (0, 1, 3, 5):
        captions = dataset[i].captions
        assert captions["re_caption"] == f"recaption {i}" and captions["org_caption"] == f"original {i}"
        assert captions["caption"] == f"alt {i}"
    assert "org_caption" not in dataset.text(2).captions and "re_caption" not in dataset.text(4).captions
    assert dataset.text(6).captions.get("re_caption") == ("recaption 5" if by == "sha256" else None)


def test_joining_again_replaces_and_a_folder_of_parquet_works(recap):
    join_captions(recap / "shards", recap / "recap.parquet")
    (recap / "parts").mkdir()
    (recap / "recap.parquet").rename(recap / "parts" / "0.parquet")
    assert join_captions(recap / "shards", recap / "parts", columns=["re_caption"]).matched == 6
    assert "org_caption" not in ShardDataset(recap / "shards").text(0).captions


def test_a_missing_column_or_file_is_named(recap):
    with pytest.raises(ValueError, match="no column 'gpt_caption'; it has url, key, sha256, re_caption, org_caption"):
        join_captions(recap / "shards", recap / "recap.parquet", columns=["gpt_caption"])
    with pytest.raises(FileNotFoundError, match=r"parquet: there is no file or folder .*other\.parquet"):
        join_captions(recap / "shards", recap / "other.parquet")
