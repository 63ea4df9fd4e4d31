"""Tokenizers: the shipped vocabulary, layouts, restriction, files, CLIP's BPE on a vocabulary worked by hand."""

import gzip
from pathlib import Path

import pytest
import torch

import ov3fast
from ov3fast.models.tokenizer import get_tokenizer, load_tokenizer

VOCABULARY = Path(ov3fast.__file__).parent / "assets" / "bert_uncased_vocab.txt"


@pytest.fixture(scope="module")
def bert():
    return get_tokenizer()


def test_the_shipped_vocabulary_is_berts_with_bos_and_eos(bert):
    pieces = VOCABULARY.read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(pieces) == 30522 == bert.vocab_size
    assert pieces[:4] == ["[PAD]", "[bos]", "[eos]", "[unused2]"]
    assert [pieces.index(p) for p in ("[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [100, 101, 102, 103]
    assert (bert.pad_id, bert.bos_id, bert.eos_id, bert.cls_id) == (0, 1, 2, 101)


def test_layouts(bert):
    # ids of bert-base-uncased: a 1037, red 2417, apple 6207
    words = [1037, 2417, 6207]
    assert bert(["A red  Apple"], 8).tolist() == [[1, *words, 2, 0, 0, 101]]
    assert bert(["a red apple"], 8, kind="caption").tolist() == [[1, *words, 2, 0, 0, 0]]
    assert bert([""], 80)[0].tolist() == [1, 2, *[0] * 77, 101]
    assert bert([], 5).shape == (0, 5) and bert([], 5).dtype == torch.int64


def test_cutting_keeps_eos_and_cls(bert):
    assert bert(["a red apple"], 6).tolist() == [[1, 1037, 2417, 6207, 2, 101]]
    assert bert(["a red apple"], 5).tolist() == [[1, 1037, 2417, 2, 101]]
    assert bert(["a red apple"], 4, kind="caption").tolist() == [[1, 1037, 2417, 2]]
    assert bert(["a red apple"], 3).tolist() == [[1, 2, 101]]


def test_special_pieces_in_a_text_are_words(bert):
    ids = bert(["[CLS] [eos] [PAD]"], 20, kind="caption")[0].tolist()
    assert ids.count(101) == 0 and ids.count(2) == 1 and 100 not in ids


def test_decoding(bert):
    for text in ("a 3d render of a red apple", "unbelievably tall giraffe"):
        for kind in ("text", "caption"):
            assert bert.decode(bert([text], 20, kind)[0]) == text
    assert bert.decode([1, 1037, 2, 6207]) == "a"
    assert bert.decode([1, 1037, 31000]) == "a"
    assert bert.decode(torch.tensor([1, 2, 0, 101])) == ""


def test_restriction_keeps_what_the_texts_say(bert):
    texts = ["a red apple", "unbelievably tall giraffe"]
    small = bert.restrict(texts)
    assert small.vocab_size < 2100
    assert (small.pad_id, small.bos_id, small.eos_id, small.cls_id) == (0, 1, 2, 4)
    ids = small(texts, 12)
    assert 0 <= int(ids.min()) and int(ids.max()) < small.vocab_size
    for text in texts:
        kept = [small.backend.id_to_token(i) for i in small.backend.encode(text, add_special_tokens=False).ids]
        assert kept == [bert.backend.id_to_token(i) for i in bert.backend.encode(text, add_special_tokens=False).ids]
    spelt = small(["zebra quiz & 42"], 30, kind="caption")[0]
    assert small.backend.token_to_id("[UNK]") not in spelt.tolist()
    assert small.decode(spelt) == "zebra quiz & 42"


def test_saved_and_loaded(bert, tmp_path):
    small = bert.restrict(["a red apple"])
    small.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    texts = ["a red apple!", "déjà vu"]
    assert (loaded.name, loaded.vocab_size) == ("wordpiece", small.vocab_size)
    assert torch.equal(loaded(texts, 16), small(texts, 16))
    assert loaded.decode(loaded(texts, 16)[0]) == "a red apple!"


def test_another_vocabulary_file(tmp_path):
    (tmp_path / "v.txt").write_text("[PAD]\n[bos]\n[eos]\n[UNK]\n[CLS]\nred\nap\n##ple\n", encoding="utf-8")
    tokenizer = get_tokenizer("wordpiece", tmp_path / "v.txt")
    assert tokenizer(["Red apple pie"], 9).tolist() == [[1, 5, 6, 7, 3, 2, 0, 0, 4]]


@pytest.fixture
def clip(tmp_path):
    # Merges in order of rank; "c a" comes before "a t</w>", so "cat" is ca + t</w> and joins by the fourth.
    lines = ['"a version header"', "c a", "a t</w>", "h e", "ca t</w>", ""]
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return get_tokenizer("clip_bpe", tmp_path / "bpe.txt.gz")


def test_clip_bpe_by_hand(clip):
    # 256 bytes, 256 at a word's end, 4 merges, then start and end of text. Bytes are listed from "!".
    assert (clip.vocab_size, clip.bos_id, clip.eos_id, clip.cls_id, clip.pad_id) == (518, 516, 517, 517, 0)

    def byte(letter, end=False):
        return ord(letter) - ord("!") + 256 * end

    ca, at, he, cat = 512, 513, 514, 515
    assert clip(["Cat  at"], 6, kind="caption").tolist() == [[516, cat, at, 517, 0, 0]]
    assert clip(["the cab"], 9).tolist() == [[516, byte("t"), byte("h"), byte("e", True), ca, byte("b", True), 517, 0, 517]]
    assert clip(["hex 42!"], 9, kind="caption").tolist() == [
        [516, he, byte("x", True), byte("4", True), byte("2", True), byte("!", True), 517, 0, 0]
    ]


def test_clip_bpe_decodes_any_script(clip, tmp_path):
    for text in ("the cat sat", "naïve 你好"):
        assert clip.decode(clip([text], 40, kind="caption")[0]) == text
    clip.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert torch.equal(loaded(["the cat"], 12), clip(["the cat"], 12)) and loaded.eos_id == 517


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda t: t("a red apple", 8), TypeError, "got one string; wrap it in a list"),
        (lambda t: t(["a"], 2), ValueError, "length must be at least 3 for kind='text', got 2"),
        (lambda t: t(["a"], 8, kind="clip"), ValueError, "kind must be 'text' or 'caption', got 'clip'"),
        (lambda t: t.decode([[1, 2]]), ValueError, "decode takes one row of ids"),
        (lambda t: get_tokenizer("t5"), ValueError, "name must be one of wordpiece, clip_bpe; got 't5'"),
        (lambda t: get_tokenizer("clip_bpe"), ValueError, "clip_bpe needs vocab_file"),
        (lambda t: get_tokenizer("wordpiece", "/nowhere/v.txt"), FileNotFoundError, "no file /nowhere/v.txt"),
        (lambda t: get_tokenizer(pieces=["[PAD]", "a"]), ValueError, r"the vocabulary has no \[bos\]"),
        (lambda t: get_tokenizer(pieces=["a", "a"]), ValueError, "repeats 1 of its 2 pieces"),
        (lambda t: load_tokenizer("/nowhere"), FileNotFoundError, "no file /nowhere/tokenizer_config.json"),
    ],
)
def test_errors(bert, call, kind, message):
    with pytest.raises(kind, match=message) as error:
        call(bert)
    assert "\n" not in str(error.value)


def test_broken_tokenizer_file_is_named(tmp_path, bert):
    bert.restrict(["a"]).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizers file"):
        load_tokenizer(tmp_path)
