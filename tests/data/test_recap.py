"""Faults in a join: lost captions, keys of other types, sides that don't match, mixed files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ov3fast.data import ShardDataset, join_captions, write_shards
from ov3fast.data.recap import JoinError
from ov3fast.data.skips import DataError


@pytest.fixture
def shards(tmp_path, files):
    """shards(["aa", "bb"], numbers=False) -> folder of shards; the JSON's `number` is the key as an integer, `sha256` a digest."""

    def make(keys):
        def record(i, key):
            return {"caption": f"alt {i}", "sha256": f"{i:064x}", "number": int(key) if key.isdigit() else None}

        samples = [(key, {"png": files(i)["png"], "json": json.dumps(record(i, key)).encode()}) for i, key in enumerate(keys)]
        write_shards(samples, tmp_path / "shards", samples_per_shard=2)
        return tmp_path / "shards"

    return make


@pytest.fixture
def parquet(tmp_path):
    def make(keys, texts, name="0.parquet", column="re_caption", by="key"):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        pq.write_table(pa.table({by: keys, column: texts}), tmp_path / "parquet" / name)
        return tmp_path / "parquet"

    return make


def join(shards, parquet, **options):
    return join_captions(shards, parquet, columns=["re_caption"], **{"by": "key", **options})


def captions(folder):
    dataset = ShardDataset(folder)
    return {dataset.text(i).key: dataset.text(i).captions.get("re_caption") for i in range(len(dataset))}


@pytest.mark.parametrize("rows", [("A", None), (None, "A"), ("A", ""), ("A", "  ")])
def test_the_text_stays_where_another_row_has_none(shards, parquet, rows):
    folder = shards(["aa", "bb"])
    report = join(folder, parquet(["aa", "aa", "bb"], [*rows, "B"]))
    assert captions(folder) == {"aa": "A", "bb": "B"}
    assert report == (2, 2, 1) and (report.rows, report.matched_rows, report.without_text) == (3, 3, 0)


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint64()])
def test_integers_match_zero_padded_keys(shards, parquet, kind):
    folder = shards(["000000001", "000000020", "000000300"])
    report = join(folder, parquet(pa.array([300, 1, 7], kind), ["C", "A", "none"]))
    assert captions(folder) == {"000000001": "A", "000000020": None, "000000300": "C"} and report.matched == 2


def test_integers_of_the_json_match_zero_padded_rows(shards, parquet):
    folder = shards(["000000001", "000000020"])
    join(folder, parquet(["0020", "1"], ["B", "A"], by="number"), by="number")
    assert captions(folder) == {"000000001": "A", "000000020": "B"}


def test_an_ambiguous_number_is_refused(shards, parquet):
    folder = shards(["01", "001", "2"])
    with pytest.raises(JoinError, match="'01' and '001' are both 1 as integer keys"):
        join(folder, parquet([1, 2], ["A", "B"]))
    assert not list(folder.glob("*.captions.json"))
    join(folder, parquet(["01", "2"], ["A", "B"]))
    assert captions(folder) == {"01": "A", "001": None, "2": "B"}


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary(2), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
)
def test_texts_of_every_kind_match(shards, parquet, kind):
    folder = shards(["aa", "bb"])
    join(folder, parquet(pa.array(["bb", "aa", "cc"]).cast(kind) if not pa.types.is_fixed_size_binary(kind) else pa.array([b"bb", b"aa", b"cc"], kind), ["B", "A", "C"]))  # fmt: skip
    assert captions(folder) == {"aa": "A", "bb": "B"}


def test_raw_digests_match_their_hexadecimal(shards, parquet):
    folder = shards(["aa", "bb"])
    digests = pa.array([(1).to_bytes(32, "big"), bytes(range(200, 232)), None], pa.binary(32))
    report = join(folder, parquet(digests, ["B", "C", "D"], by="sha256"), by="sha256")
    assert captions(folder) == {"aa": None, "bb": "B"} and report.matched == 1


@pytest.mark.parametrize(
    "kind, value", [(pa.float64(), 1.0), (pa.bool_(), True), (pa.timestamp("s"), 1), (pa.list_(pa.string()), ["aa"])]
)
def test_other_key_types_are_refused_by_name(shards, parquet, kind, value):
    with pytest.raises(JoinError, match=r"by: the column 'key' of .*0\.parquet holds (double|bool|timestamp|list)"):
        join(shards(["aa"]), parquet(pa.array([value], kind), ["A"]))


def test_captions_are_text_or_lists_of_text(shards, parquet):
    folder = shards(["aa", "bb", "cc"])
    join(folder, parquet(["aa", "bb", "cc"], [["A1", None, "A2"], [], None]))
    assert captions(folder) == {"aa": ("A1", "A2"), "bb": None, "cc": None}
    with pytest.raises(JoinError, match=r"columns: the column 're_caption' of .* holds double; captions are text"):
        join(folder, parquet(["aa"], [1.5]))


def test_sides_that_do_not_fit_are_an_error_that_shows_both_keys(shards, parquet):
    folder = shards(["aa", "bb"])
    with pytest.raises(
        DataError, match="0 of 2 samples match by 'key': the samples' key looks like 'aa', the parquet's like 'http://x/1'"
    ):
        join(folder, parquet(["http://x/1", "http://x/2"], ["A", "B"]))
    many = [f"k{i}" for i in range(300)]
    with pytest.raises(JoinError, match=r"1 of 301 rows of the parquet match by 'key': .* pass least_match=0"):
        join(folder, parquet(["aa", *many], ["A"] * 301))
    with pytest.raises(
        JoinError, match="no sample has a uid .their JSON has caption, number, sha256., the parquet's like 'aa'"
    ):
        join(folder, parquet(["aa"], ["A"], by="uid"), by="uid")
    assert not list(folder.glob("*.captions.json"))
    report = join(folder, parquet(["aa", *many], ["A"] * 301), least_match=0)
    assert str(report).startswith("1 of 2 samples in 1 shards got captions, from 1 of 301 rows")


def test_files_of_different_schemas(shards, parquet):
    folder = shards(["000000001", "000000020", "000000300", "000004000"])
    parquet(["000000001"], ["A"], "0.parquet")
    parquet(pa.array([20], pa.int64()), ["B"], "1.parquet")
    parquet(["000000300"], ["org"], "2.parquet", column="org_caption")
    parts = parquet(pa.array([b"000004000"]), [["D1", "D2"]], "3.parquet")
    (parts / "README.md").write_text("not parquet")
    (parts / "._0.parquet").write_bytes(b"x")
    report = join_captions(folder, parts, by="key")
    assert captions(folder) == {"000000001": "A", "000000020": "B", "000000300": None, "000004000": ("D1", "D2")}
    assert ShardDataset(folder).text(2).captions["org_caption"] == "org" and report == (4, 4, 2)
    parquet(["x"], ["X"], "4.parquet", by="other")
    with pytest.raises(ValueError, match=r"no column 'key' in .*4\.parquet; it has other, re_caption"):
        join_captions(folder, parts, by="key")


def test_broken_files_are_named(shards, parquet, tmp_path):
    folder = shards(["aa"])
    (parquet(["aa"], ["A"]) / "1.parquet").write_bytes(b"no parquet")
    with pytest.raises(JoinError, match=r"1\.parquet can't be read"):
        join(folder, tmp_path / "parquet")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet file"):
        join(folder, tmp_path / "none")


def test_samples_without_a_key_are_counted(tmp_path, files, parquet):
    records = [{"uid": "aa"}, {"uid": None}, {"uid": 1.5}, {"uid": True}, {}]
    samples = [(str(i), {"png": files(i)["png"], "json": json.dumps(record).encode()}) for i, record in enumerate(records)]
    samples.append(("5", {"png": files(5)["png"], "json": b"{"}))
    write_shards(samples, tmp_path / "shards")
    report = join(tmp_path / "shards", parquet(["aa"], ["A"], by="uid"), by="uid")
    assert report == (6, 1, 1) and report.without_key == 5


def test_many_rows_and_names_of_any_bytes(tmp_path, files, parquet):
    keys = [b"caf\xe9".decode("utf-8", "surrogateescape"), "line\nbreak", *(f"{i:05d}" for i in range(50))]
    write_shards([(key, files(i)) for i, key in enumerate(keys)], tmp_path / "shards")
    order = np.random.default_rng(0).permutation(51)
    report = join(tmp_path / "shards", parquet([keys[1 + i] for i in order], [f"text {i}" for i in order]))
    assert report == (52, 51, 1) and captions(tmp_path / "shards")["00017"] == "text 18"
    latin = parquet(pa.array([b"caf\xe9"]), ["ours"])
    assert join(tmp_path / "shards", latin, least_match=0).matched == 1 and captions(tmp_path / "shards")[keys[0]] == "ours"
