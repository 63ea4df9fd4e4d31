import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ov3fast.data import ShardDataset, join_captions, write_shards
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
