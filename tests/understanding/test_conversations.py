"""LLaVA's formats and templates: the loss mask, rejected inputs, and packed rows."""

import json

import pytest
import torch

from ov3fast.understanding.batches import collate, pack, rows_of_epoch
from ov3fast.understanding.conversations import (
    IGNORED,
    IMAGE,
    TEMPLATES,
    Conversation,
    Encoder,
    Turn,
    read_conversations,
    write_conversations,
)
from ov3fast.understanding.model import small_tokenizer

pytest.importorskip("transformers")

TALK = Conversation((Turn("what is it?", "a cat", True), Turn("is it red?", "no")), "a.jpg")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for turn in TALK.turns for text in turn[:2]] + ["user : assistant im _ start end system"]
    return small_tokenizer(texts + [template.system for template in TEMPLATES.values()])


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids).replace(" ", "")


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_answers_alone_carry_loss(tokenizer, template):
    encoder = Encoder(tokenizer, template, image_tokens=3)
    found = encoder(TALK)
    end = decoded(tokenizer, encoder.end)
    answers = [label for label in found.labels if label != IGNORED]
    assert decoded(tokenizer, answers) == f"acat{end}no{end}"
    assert all(label in (IGNORED, id) for id, label in zip(found.ids, found.labels, strict=True))
    assert found.ids.count(IMAGE) == 3 and found.image == "a.jpg"
    whole = decoded(tokenizer, [id for id in found.ids if id != IMAGE])
    assert ("whatisit?" in whole) == TEMPLATES[template].asks
    # The prompt is exactly the training prefix before the first answer.
    prompt = encoder.prompt("what is it?", "a.jpg").ids
    first = next(place for place, label in enumerate(found.labels) if label != IGNORED)
    assert found.ids[: len(prompt)] == prompt and first == len(prompt)


def test_vicunas_text_is_llavas(tokenizer):
    encoder = Encoder(tokenizer, "vicuna", image_tokens=0)
    expected = TEMPLATES["vicuna"].system + "USER: what is it? ASSISTANT: a cat[eos]USER: is it red? ASSISTANT: no[eos]"
    assert decoded(tokenizer, encoder(TALK).ids) == expected.lower().replace(" ", "")


def test_what_is_cut_off(tokenizer):
    encoder = Encoder(tokenizer, "short", image_tokens=3)
    whole = encoder(TALK)
    assert encoder(TALK, 2) is None  # cuts into the image
    assert encoder(TALK, 4) is None  # leaves no answer
    cut = encoder(TALK, len(whole.ids) - 1)
    assert cut.ids == whole.ids[:-1] and cut.labels == whole.labels[:-1]
    blind = Encoder(tokenizer, "plain", image_tokens=0)(TALK)
    assert IMAGE not in blind.ids and blind.image is None
    assert blind.labels[0] == IGNORED and blind.labels[1:] == blind.ids[1:]  # nothing predicts the first token


def test_files_come_back(tmp_path):
    talks = [TALK, Conversation((Turn("hello", "good day"),))]
    write_conversations(tmp_path / "talks.json", talks)
    assert read_conversations(tmp_path / "talks.json") == talks
    records = json.loads((tmp_path / "talks.json").read_text())
    assert records[0]["conversations"][0] == {"from": "human", "value": "<image>\nwhat is it?"}
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_conversations(tmp_path / "talks.jsonl") == talks


def test_llavas_liberties(tmp_path):
    """A leading assistant message is dropped; <image> after the question is moved in front of it."""
    lines = [("gpt", "hi"), ("human", "what is it?\n<image>"), ("gpt", "a cat")]
    record = {"image": "a.jpg", "conversations": [{"from": who, "value": text} for who, text in lines]}
    (tmp_path / "x.json").write_text(json.dumps([record]))
    assert read_conversations(tmp_path / "x.json") == [Conversation((Turn("what is it?", "a cat", True),), "a.jpg")]


def line(who, value):
    return {"from": who, "value": value}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({}, "must be a list"),
        ([{"id": 1}], "record 0 has no list `conversations`"),
        ([{"conversations": [line("human", "a")]}], "take turns"),
        ([{"conversations": [line("human", "a"), line("human", "b")]}], "take turns, human and gpt; got human, human"),
        ([{"conversations": [line("human", "<image>a"), line("gpt", "b")]}], "<image> once where it has an image; got 1"),
        ([{"image": "x", "conversations": [line("human", "a"), line("gpt", "b")]}], "got 0 and image 'x'"),
        ([{"image": "x", "conversations": [line("human", "a"), line("gpt", "<image>")]}], "in an answer"),
    ],
)
def test_what_is_refused(tmp_path, records, words):
    (tmp_path / "x.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=words):
        read_conversations(tmp_path / "x.json")


def test_broken_and_missing_files(tmp_path, tokenizer):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_conversations(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_conversations(tmp_path / "y.json")
    with pytest.raises(ValueError, match="template must be one of plain, short, vicuna, chatml; got 'x'"):
        Encoder(tokenizer, "x", 1)


def test_packing_fills_rows_and_leaves_nothing_out():
    lengths = [5, 9, 4, 1, 7, 3, 3, 2]
    rows = pack(lengths, 10)
    assert sorted(number for row in rows for number in row) == list(range(8))
    assert all(sum(lengths[number] for number in row) <= 10 for row in rows) and len(rows) == 4
    one = rows_of_epoch(lengths, 0, seed=1, stage=0, packed=False, max_length=10)
    other = rows_of_epoch(lengths, 1, seed=1, stage=0, packed=False, max_length=10)
    assert sorted(one) == sorted(other) == [[i] for i in range(8)] and one != other


def test_a_packed_row_keeps_its_conversations_apart(tokenizer):
    encoder = Encoder(tokenizer, "short", image_tokens=2)
    one, other = encoder(TALK), encoder(Conversation((Turn("is it red?", "no"),)))
    packed = collate([[one, other], [other]])
    length = len(one.ids) + len(other.ids)
    assert packed.ids.shape == (2, length) and packed.mask.shape == (2, 1, length, length)
    assert packed.positions[0].tolist() == [*range(len(one.ids)), *range(len(other.ids))]
    assert packed.mask[0, 0].sum() == sum(n * (n + 1) // 2 for n in (len(one.ids), len(other.ids)))
    assert not packed.mask[0, 0, len(one.ids) :, : len(one.ids)].any() and packed.images == ["a.jpg"]
    padded = collate([[one], [other]])
    assert padded.mask.dtype == torch.bool and padded.mask.sum(1).tolist() == [len(one.ids), len(other.ids)]
    assert padded.answers == packed.answers - (packed.labels[1] != IGNORED).sum()
